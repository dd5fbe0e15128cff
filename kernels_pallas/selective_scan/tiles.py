"""Tile sizes of the TPU kernels; README.md has the schedules that chose them."""

LANES = 128
TOKENS = 128  # a tile of time: the states of one are kept in VMEM by the backward pass
CHANNELS = 512  # of a tile, at most: fewer hide less of the latencies
STATES = 16_384  # N x channels of a tile, at most: more does not fit into registers and takes long to compile
VMEM = 40 << 20  # bytes; wide states (N above 64) need more than the compiler's default


def tile(length: int, width: int, states: int) -> tuple[int, int]:
    """Tokens and channels of a tile, both multiples of 128."""
    channels = min(CHANNELS, max(LANES, STATES // (-(-states // 8) * 8) // LANES * LANES))
    return TOKENS, min(channels, -(-width // LANES) * LANES)
