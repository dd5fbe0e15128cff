"""Sizes of the TPU kernels' transforms and tiles."""

LANES = 128  # channels a grid step
COLUMNS = 64  # N2, the second factor of every transform: as [2 N2, 2 N2] real numbers it fills a matrix unit of 128
GROUP = 8  # columns that share a table of the first factor's transform
PITCH = 65  # rows of VMEM from n1 to n1 + 1: at an odd distance the sublanes of a column lie in as many banks
TOGETHER = 2  # columns, or rows, side by side in a product: 256 lanes, as a matrix unit of v6e and later has
LONGEST = 8192  # tokens: 128 x 64 points
SPLIT = {"bfloat16": 2, "float32": 3}  # bfloat16 numbers in place of a float32: errors of 9e-6 and 1e-6 (README.md)

# Products that a turn of a loop makes independently of each other, so that the units need not wait. Bundles per 1024
# elements (libtpu 0.0.52) at bf16 4x4096x768, forward / backward, from results/kernels/tune.jsonl:
#        1            2            4            8
#   v5e  59.4 / 88.6  48.7 / 75.6  45.6 / 69.4  42.4 / 66.6
#   v6e  42.8 / 63.9  36.7 / 56.6  31.4 / 47.8  27.4 / 43.5
# 8 save a twentieth to a seventh and nearly double the program and the time to compile it.
AT_ONCE = 4


def rows(length: int) -> int:
    """N1 of a transform of N1 N2 >= length points, a multiple of the 16 sublanes of a bfloat16 register."""
    return -(-length // (16 * COLUMNS)) * 16
