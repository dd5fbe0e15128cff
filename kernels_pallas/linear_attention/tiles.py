"""Tile sizes of the TPU kernels by shape, each with its measurement."""

from typing import Any, NamedTuple

from kernels_pallas import mosaic_tpu

CHUNK = 128  # tokens that meet in one matrix product: the width of the matrix unit up to v5p
STEP = 512  # tokens a grid step, and so between two saved states
HEADS = 2  # a grid step


class Plan(NamedTuple):
    """What a kernel is built from, all static."""

    chunk: int
    chunks: int  # a grid step
    heads: int  # a grid step
    key_width: int  # of one head, filled up
    value_width: int
    decay: str | None  # None, "head" or "channel"
    interpret: mosaic_tpu.Interpret


def choose(
    shape: tuple[int, ...],
    values: int,
    dtype: Any,
    decay: str | None,
    device: str | None,
    *,
    chunk: int | None = None,
    step: int | None = None,
    heads: int | None = None,
    interpret: mosaic_tpu.Interpret = False,
) -> Plan:
    """The plan for q of shape [B T H K] and values of that width; what is None is chosen."""
    _, length, count, keys = shape
    key_width, value_width = width(keys, count), width(values, count)
    chunk = min(chunk or CHUNK, max(16, 1 << (length - 1).bit_length()))
    chunks = max(1, min(step or STEP, length + chunk - 1) // chunk)
    together = heads_together(count, key_width, value_width, heads or HEADS)
    return Plan(chunk, chunks, together, key_width, value_width, decay, interpret)


def width(size: int, heads: int) -> int:
    """A head's width as the kernels take it: a multiple of 128 lanes, or 64 where two heads fill them."""
    return size if size % 128 == 0 or (size == 64 and heads % 2 == 0) else -(-size // 128) * 128


def heads_together(heads: int, key_width: int, value_width: int, most: int) -> int:
    """The largest divisor of `heads` up to `most` whose columns are whole lane tiles, else the smallest."""
    fit = [n for n in range(1, heads + 1) if heads % n == 0 and n * key_width % 128 == 0 and n * value_width % 128 == 0]
    return max([n for n in fit if n <= most] or fit[:1])
