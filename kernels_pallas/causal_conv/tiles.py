"""Tiles of the TPU kernels, chosen by the static schedule on v5e (scripts/tpu_schedule.py)."""

ROWS = 16  # tokens are cut in multiples of this, two bfloat16 sublane tiles; it also bounds the taps
LANES = 128
CHUNK = 512  # tokens a grid step
WIDTH = 512  # channels a grid step
PIECE = 64  # tokens worked on at a time: their float32 values stay in registers


def lengths(length: int, masked: bool, chunk: int) -> int:
    """Tokens a grid step: at most `chunk` and the length, in whole tiles."""
    unit = LANES if masked else ROWS  # a mask is turned in VMEM, by squares of 128
    return max(unit, min(chunk, length) // unit * unit)


def widths(width: int, most: int) -> int:
    """Channels a grid step."""
    return width if width <= LANES else min(most, width // LANES * LANES)
