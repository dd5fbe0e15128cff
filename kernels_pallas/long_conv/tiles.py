"""Sizes of the TPU kernels' transforms and tiles."""

LANES = 128  # the second factor of every transform: the lanes of a register, the side of the matrix unit
LONGEST = 8192  # tokens: 2 T = 128 x 128 points
CHANNELS = 8  # a grid step


def factors(length: int) -> tuple[int, int]:
    """(N1, N2) of a transform of N1 N2 >= 2 length points; N1 / 2 is a multiple of 8, the sublanes of a register."""
    return max(16, -(-2 * length // (16 * LANES)) * 16), LANES
