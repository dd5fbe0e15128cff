"""Tile sizes of the TPU kernels by shape, each with its measurement."""

from typing import NamedTuple

import jax.numpy as jnp

from kernels_pallas import mosaic_tpu

CHUNK = 128  # the matrix unit's width; products of 64 fill a quarter of it, and the inverse grows with the square
LEAST = 16  # a shorter sequence is filled up to this
LANES = 128


class Plan(NamedTuple):
    """What a kernel is built from, all static."""

    chunk: int
    heads: int  # a grid step
    per_step: int  # chunks a grid step
    key_width: int  # of one head, filled up
    value_width: int
    gated: bool
    decay_parts: int  # bfloat16 parts that a log decay is cut in for the sums over pairs of tokens
    interpret: mosaic_tpu.Interpret
    vmem: int | None  # bytes a kernel may use
    forward_working: int  # bytes of the values inside a kernel
    backward_working: int


def width(size: int, heads: int) -> int:
    """A head's width as the kernels take it: a multiple of 128 lanes, or 64 where two heads fill them."""
    return size if size % LANES == 0 or (size == 64 and heads % 2 == 0) else -(-size // LANES) * LANES


def units(dtype, key_width: int, value_width: int) -> int:
    """Heads times chunks of a grid step: independent work that fills the latency of the products, as VMEM allows."""
    most = 8 if dtype == jnp.bfloat16 else 4
    return max(1, most // -(-max(key_width, value_width) // LANES))


def heads_together(heads: int, key_width: int, value_width: int, most: int) -> int:
    """The largest divisor of `heads` up to `most` whose columns are whole lane tiles, or the smallest."""
    fit = [
        n
        for n in range(1, heads + 1)
        if heads % n == 0 and (n == heads or (n * key_width % LANES == 0 and n * value_width % LANES == 0))
    ]
    return max([n for n in fit if n <= most] or fit[:1])


def plan(
    length: int,
    heads: int,
    key_width: int,
    value_width: int,
    dtype,
    gated: bool,
    interpret: mosaic_tpu.Interpret,
    chunk: int | None = None,
    together: int | None = None,
) -> Plan:
    """The tiles for a shape; chunk and together (heads times chunks of a step) overrule the table."""
    key_width, value_width = width(key_width, heads), width(value_width, heads)
    chunk = min(chunk or CHUNK, max(LEAST, 1 << (length - 1).bit_length()))
    together = together or units(dtype, key_width, value_width)
    count = heads_together(heads, key_width, value_width, together)
    per_step = max(1, min(together // count, -(-length // chunk)))
    exact = dtype == jnp.float32
    side = max(chunk, key_width, value_width)
    square = 4 * chunk * side * count * per_step  # bytes of one array [C C], [C K] or [C V] of each unit
    wide = exact or side > LANES or count * per_step > 8
    return Plan(
        chunk=chunk,
        heads=count,
        per_step=per_step,
        key_width=key_width,
        value_width=value_width,
        gated=gated,
        decay_parts=3 if exact else 2,
        interpret=interpret,
        vmem=mosaic_tpu.MOST if wide else None,
        forward_working=square * (18 if exact else 6),  # by what the compiler spills at these shapes
        backward_working=square * (38 if exact else 16),
    )
