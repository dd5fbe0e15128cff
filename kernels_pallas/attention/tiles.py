"""Tile sizes of the chunked form, each with its measurement."""

import jax

ROWS = COLUMNS = 1024  # where every key is visible
SKIPPED = 384  # where tiles can be left out: taking turns, 256 was slower at 1K to 4K, 512 at 1K and 2K
ELEMENTS = 1 << 20  # scores a step


def choose(batch, groups, queries, keys, window):
    """((batch rows, key heads) a step, queries a tile, keys a tile)."""
    rows, columns = (ROWS, COLUMNS) if window == (None, None) else (SKIPPED, SKIPPED)
    rows, columns = _even(queries, rows), _even(keys, columns)
    if jax.default_backend() != "cpu" or jax.sharding.get_abstract_mesh().size > 1:
        return (batch, groups), rows, columns  # no loop over axes that may be sharded or run in parallel
    most = max(1, ELEMENTS // (rows * columns))
    heads = _divisor(groups, most)
    return (_divisor(batch, most // groups) if heads == groups else 1, heads), rows, columns


def _divisor(number, most):
    return max(n for n in range(1, number + 1) if number % n == 0 and n <= max(most, 1))


def _even(length, most):
    """The smallest tile that needs as few tiles as `most` does, a multiple of 16 unless there is only one."""
    count = -(-length // most)
    return length if count == 1 else min(-(-length // (16 * count)) * 16, length)
