"""Tile sizes of the TPU kernels by shape, each with its measurement."""

from typing import NamedTuple

from kernels_pallas import mosaic_tpu

CHUNK = 128
LEAST = 16  # a chunk of fewer tokens is filled up to this
UNITS = 8  # heads times chunks worked on together in a grid step


class Plan(NamedTuple):
    """What a kernel is built from, all static."""

    chunk: int
    heads: int  # a grid step
    per_step: int  # chunks a grid step
    key_width: int  # of one head, filled up
    value_width: int
    gated: bool
    decay_parts: int  # bfloat16 parts that a log decay is cut in
    interpret: mosaic_tpu.Interpret
    vmem: int | None


def width(size: int, heads: int) -> int:
    """A head's width as the kernels take it: a multiple of 128 lanes, or 64 where two heads fill them."""
    return size if size % 128 == 0 or (size == 64 and heads % 2 == 0) else -(-size // 128) * 128


def heads_together(heads: int, key_width: int, value_width: int, most: int) -> int:
    """The largest divisor of `heads` up to `most` whose columns are whole lane tiles."""
    fit = [
        n
        for n in range(1, heads + 1)
        if heads % n == 0 and (n == heads or (n * key_width % 128 == 0 and n * value_width % 128 == 0))
    ]
    return max([n for n in fit if n <= most] or [fit[0]])
