"""Tile sizes of the TPU kernels by shape, by scripts/tune_kernel.py delta_rule (results/kernels/tune.jsonl)."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from kernels_pallas import mosaic_tpu

# Bundles a token and head at chunk 64, 128, 256 of 8 heads: 5.8, 4.8, 8.7 forward, 9.1, 8.7, 14.0 backward (v5e, bf16,
# heads of 128, gated). Products of 64 leave the matrix unit half empty; the inverse and G grow with the chunk.
CHUNK = 128
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
    vmem: int | None  # bytes the kernel may use
    working: int  # bytes of the values inside the kernel


class Plans(NamedTuple):
    """Of both kernels, which share chunk and widths."""

    forward: Plan
    backward: Plan


def width(size: int, heads: int) -> int:
    """A head's width as the kernels take it: a multiple of 128 lanes, or 64 where two heads fill them."""
    return size if size % LANES == 0 or (size == 64 and heads % 2 == 0) else -(-size // LANES) * LANES


def units(dtype: Any, key_width: int, value_width: int, backward: bool) -> int:
    """Heads times chunks of a grid step: independent work that fills the latency of the products, as VMEM allows.

    Bundles a token and head at 2, 4, 8, 16 units: 7.3, 5.9, 4.8, 4.1 forward and 12.1, 10.1, 8.7, 7.9 backward (v5e,
    bfloat16, heads of 128, gated). The backward kernel of 16 is twice the code for a tenth of the time.
    """
    most = 4 if dtype == jnp.float32 else 8 if backward else 16
    return max(1, most // -(-max(key_width, value_width) // LANES))


def heads_together(heads: int, key_width: int, value_width: int, most: int) -> int:
    """The largest divisor of `heads` up to `most` whose columns are whole lane tiles, or the smallest."""
    fit = [
        n
        for n in range(1, heads + 1)
        if heads % n == 0 and (n == heads or (n * key_width % LANES == 0 and n * value_width % LANES == 0))
    ]
    return max([n for n in fit if n <= most] or fit[:1])


def chunks_together(chunks: int, most: int) -> int:
    """A power of two up to `most`, so small that at most a quarter is added to fill up the last step."""
    count = 1 << (most.bit_length() - 1)
    while count > 1 and -(-chunks // count) * count > 1.25 * chunks:
        count //= 2
    return count


def plan(
    length: int,
    heads: int,
    key_width: int,
    value_width: int,
    dtype: Any,
    gated: bool,
    interpret: mosaic_tpu.Interpret,
    chunk: int | None = None,
    together: int | None = None,
) -> Plans:
    """The tiles for a shape; chunk and together (heads times chunks of a step) overrule the table."""
    key_width, value_width = width(key_width, heads), width(value_width, heads)
    chunk = min(chunk or CHUNK, max(LEAST, 1 << (length - 1).bit_length()))
    exact = dtype == jnp.float32
    side = max(chunk, key_width, value_width)

    def one(backward: bool) -> Plan:
        most = together or units(dtype, key_width, value_width, backward)
        count = heads_together(heads, key_width, value_width, most)
        per_step = chunks_together(-(-length // chunk), max(1, most // count))
        arrays = (38 if exact else 16) if backward else (18 if exact else 6)  # by what the compiler spills
        return Plan(
            chunk=chunk,
            heads=count,
            per_step=per_step,
            key_width=key_width,
            value_width=value_width,
            gated=gated,
            decay_parts=3 if exact else 2,
            interpret=interpret,
            vmem=mosaic_tpu.MOST if exact or side > LANES or count * per_step > 8 else None,
            working=4 * chunk * side * count * per_step * arrays,
        )

    return Plans(one(False), one(True))
