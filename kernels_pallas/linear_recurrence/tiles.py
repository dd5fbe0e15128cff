"""Tile sizes of the TPU kernels; README.md has the schedules that chose them."""

TOKENS = (
    256  # a tile of time: the state stays in registers over it, and its blocks are moved while another is worked on
)
CHANNELS = 512  # four registers of 128 lanes, whose chains of states run side by side


def tile(length: int, width: int, planes: int) -> tuple[int, int]:
    """Tokens and channels of a tile. planes: 1 real, 2 complex."""
    channels = min(CHANNELS // planes, -(-width // 128) * 128)
    return min(TOKENS, -(-length // 16) * 16), channels
