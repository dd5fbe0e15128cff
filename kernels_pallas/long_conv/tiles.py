"""Sizes of the TPU kernels' transforms and tiles."""

LANES = 128  # channels a grid step
COLUMNS = 64  # N2, the second factor of every transform: [2 N2, 2 N2] real numbers fill the matrix unit
GROUP = 8  # columns that share a table of the first factor's transform
LONGEST = 8192  # tokens: 128 x 64 points
TOGETHER = 2  # columns, or rows, side by side in a product: 256 lanes

SPLIT = {"bfloat16": 2, "float32": 3}  # bfloat16 numbers in place of a float32: errors of 9e-6 and 1e-6 (README.md)


def rows(length: int) -> int:
    """N1 of a transform of N1 N2 >= length points, a multiple of the 16 sublanes of a bfloat16 register."""
    return -(-length // (16 * COLUMNS)) * 16
