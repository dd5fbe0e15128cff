"""Loops over blocks of rows and tokens, in place: no array is cut, transposed or stacked as a whole.

What a step reads is sliced out of [B T *] and what it makes is written into [B T *], so beside inputs and results a
program holds the arrays of one block: on a CPU those stay in cache. For forms that carry a state along T and bring
their own derivative: their backward pass is a second loop, in reverse, from the states the first one kept.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Body = Callable[[Any, Any, Any], tuple[Any, Any, Any]]


@dataclass(frozen=True)
class Blocks:
    """How [B T] is cut. Hashable: a static argument."""

    rows: int  # batch rows a block; divides B
    size: int  # tokens a block
    count: int  # blocks along T; the last one is filled up


def cut(batch: int, length: int, tokens: int, chunk: int, looped: bool) -> Blocks:
    """Blocks of about `tokens` tokens in all, whatever B and T are: so a step costs the same for many short rows and
    for few long ones. looped: rows may be walked over (a CPU); else a block has all rows.

    A block's size is a multiple of `chunk`, and evened out, so that the last block is not nearly empty.
    """
    size = max(chunk, tokens if looped else tokens // batch)
    size = math.ceil(length / (math.ceil(length / size) * chunk)) * chunk
    most = min(batch, max(1, tokens // size)) if looped else batch
    rows = max(n for n in range(1, most + 1) if batch % n == 0)
    return Blocks(rows, size, math.ceil(length / size))


def over(
    blocks: Blocks, body: Body, carry: Any, tokens: Any, kept: Any = None, *, reverse: bool = False
) -> tuple[Any, Any, Any]:
    """body(carry, tokens, kept) -> (carry, tokens, kept) for every block along T, in order or in reverse.

    Args:
      carry: arrays [B *], handed on along T; body sees the rows of its block.
      tokens: arrays [B T *], of which body sees [rows size *], filled up with zeros behind the last token.
      kept: arrays [count B *], of which body sees the [rows *] of its block.

    Returns:
      the last carry; what body makes of tokens, as [B T *]; what it keeps, as [count B *].
    """
    batch, length = jax.tree.leaves(tokens)[0].shape[:2]
    rows, size, count = blocks.rows, blocks.size, blocks.count
    fill = count * size - length
    if fill:
        tokens = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2)), tokens)

    def some_rows(row, x):
        return jax.lax.dynamic_slice_in_dim(x, row, rows, 0)

    def read(row, i):
        """The tokens and what was kept of block i of the rows from `row` on."""
        x = jax.tree.map(lambda x: _slice(x, (row, i * size), (rows, size)), tokens)
        return x, jax.tree.map(lambda x: _slice(x, (i, row), (1, rows))[0], kept)

    state = jax.tree.map(lambda x: x[:rows], carry)
    _, made, keeps = jax.eval_shape(body, state, *jax.eval_shape(read, 0, 0))
    start = (
        carry,
        jax.tree.map(lambda x: jnp.zeros((batch, count * size, *x.shape[2:]), x.dtype), made),
        jax.tree.map(lambda x: jnp.zeros((count, batch, *x.shape[1:]), x.dtype), keeps),
    )

    def group(g, results):
        """All blocks of one group of rows."""
        row = g * rows

        def block(n, loop):
            state, made, keeps = loop
            i = count - 1 - n if reverse else n
            state, x, keep = body(state, *read(row, i))
            made = jax.tree.map(lambda all, x: _put(all, x, (row, i * size)), made, x)
            return state, made, jax.tree.map(lambda all, x: _put(all, x[None], (i, row)), keeps, keep)

        carry, made, keeps = results
        state = jax.tree.map(lambda x: some_rows(row, x), carry)
        state, made, keeps = _loop(count, block, (state, made, keeps))
        return jax.tree.map(lambda all, x: _put(all, x, (row,)), carry, state), made, keeps

    carry, made, keeps = _loop(batch // rows, group, start)
    return carry, jax.tree.map(lambda x: x[:, :length], made), keeps


def _loop(count, step, carry):
    return step(0, carry) if count == 1 else jax.lax.fori_loop(0, count, step, carry)


def _slice(x, starts, sizes):
    return jax.lax.dynamic_slice(x, starts + (0,) * (x.ndim - len(starts)), (*sizes, *x.shape[len(sizes) :]))


def _put(x, part, starts):
    if x.shape == part.shape:
        return part
    return jax.lax.dynamic_update_slice(x, part, starts + (0,) * (x.ndim - len(starts)))
