"""Arithmetic in registers that the forward and the backward kernel share.

A number is a tuple of planes: (x,) real, (re, im) complex. A plane is [8 W]: 8 tokens on sublanes, channels on lanes.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

ROWS = 8  # sublanes of a register of float32
GROUP = 16  # rows of a register of bfloat16: what is loaded and stored at once

Number = tuple[jax.Array, ...]


def times(x: Number, y: Number) -> Number:
    if len(x) == 1:
        return (x[0] * y[0],)
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def plus(x: Number, y: Number) -> Number:
    return tuple(p + q for p, q in zip(x, y))


def conjugate(x: Number) -> Number:
    return x if len(x) == 1 else (x[0], -x[1])


def one_if(where: jax.Array, x: Number) -> Number:
    """1 where `where`, else x."""
    return tuple(jnp.where(where, float(n == 0), p) for n, p in enumerate(x))


def zero_if(where: jax.Array, x: Number) -> Number:
    return tuple(jnp.where(where, 0.0, p) for p in x)


def spread(x: Number, row: int) -> Number:
    """One row to all rows."""
    return tuple(jnp.broadcast_to(p[row : row + 1], p.shape) for p in x)


def moved(x: Number, rows: int, reverse: bool) -> Number:
    """Every row to `rows` later in the order of reading, the last ones to the front."""
    return tuple(pltpu.roll(p, ROWS - rows if reverse else rows, 0) for p in x)


def first(shape: tuple[int, ...], rows: int, reverse: bool) -> jax.Array:
    """True on the first rows in the order of reading."""
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return row >= ROWS - rows if reverse else row < rows


def products(a: Number, reverse: bool) -> list[Number]:
    """The products of the last 1, 2, 4 and 8 rows' a, up to each row; [3] from the first row to each."""
    steps = [a]
    for rows in (1, 2, 4):
        before = one_if(first(a[0].shape, rows, reverse), moved(steps[-1], rows, reverse))
        steps.append(times(steps[-1], before))
    return steps


def scanned(steps: list[Number], b: Number, reverse: bool) -> Number:
    """The recurrence over the rows from a state of zero, in three steps that join stretches of 1, 2 and 4 rows."""
    for a, rows in zip(steps, (1, 2, 4)):
        before = zero_if(first(b[0].shape, rows, reverse), moved(b, rows, reverse))
        b = plus(b, times(a, before))
    return b
