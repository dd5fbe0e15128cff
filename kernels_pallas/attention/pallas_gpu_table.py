"""Which tiles of keys a tile of queries visits, known when tracing: NumPy tables that the GPU kernels walk through."""

from typing import NamedTuple

import numpy as np

TILE = 64  # queries, and keys


class Table(NamedTuple):
    """For every tile of queries [J M], how many tiles of keys it visits; and which [J M W], twice the number, plus 1
    where the tile needs a mask. J is 1, or the heads."""

    counts: np.ndarray
    visits: np.ndarray


def tables(
    queries: int,
    keys: int,
    window: tuple[int | None, int | None],
    blocks: np.ndarray | None,
    masked: bool,
) -> tuple[Table, Table]:
    """(keys that each tile of queries visits, queries that each tile of keys visits).

    masked: every tile needs a mask, as ids of segments or padding are known when running only.

    Raises:
      NotImplementedError: blocks of the mask are not made of whole tiles.
    """
    rows, columns = -(-queries // TILE), -(-keys // TILE)
    first = np.arange(rows)[:, None] * TILE + keys - queries  # the position of a tile's first query
    last = np.minimum(first + TILE, keys) - 1
    start = np.arange(columns)[None, :] * TILE
    end = np.minimum(start + TILE, keys) - 1
    left, right = window
    some, every = np.ones((2, rows, columns), bool)
    if left is not None:  # s >= position - left
        some, every = some & (end >= first - left), every & (start >= last - left)
    if right is not None:
        some, every = some & (start <= last + right), every & (end <= first + right)
    every = every & (end == start + TILE - 1) & (not masked)
    some, every = some[None], every[None]
    if blocks is not None:
        high, wide = queries // blocks.shape[1], keys // blocks.shape[2]
        if high % TILE or wide % TILE:
            raise NotImplementedError(
                f"attention: the GPU kernels skip tiles of {TILE} x {TILE}, and blocks of {high} x {wide} are not made "
                f"of them; take blocks that are multiples of {TILE}, or 'chunked'"
            )
        some = some & blocks.repeat(high // TILE, 1).repeat(wide // TILE, 2)
    every = np.broadcast_to(every, some.shape)
    return _pack(some, every), _pack(some.swapaxes(1, 2), every.swapaxes(1, 2))


def _pack(some, every):
    counts = some.sum(-1).astype(np.int32)
    order = np.argsort(~some, -1, kind="stable")[..., : max(1, counts.max())]
    visits = 2 * order + ~np.take_along_axis(every, order, -1)
    return Table(counts, visits.astype(np.int32))
