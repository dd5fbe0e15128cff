"""A chunk of the TPU kernels with a decay a key channel, by halves. README.md has the derivation."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.linear_attention.pallas_tpu_chunk import dot, rows_columns, sums_left

Array = jax.Array

ROWS = 8  # of a register: sums over fewer tokens are made by rotating it


def stretches(g: Array) -> tuple[list[tuple[int, Array]], Array, Array]:
    """Sums of the decays g [C K], each of them direct.

    Returns:
      (m, x [C K]) for m = 1, 2, 4, ... C / 2: in stretches of m tokens, x is the sum since the start of an odd stretch
      up to and with each token, and until the end of an even one after each token: from a key s to a query t of the
      next stretch there is x_s + x_t.
      The sum since the start of the chunk up to and with each token, and until its end after each, [C K].
    """
    size, width = g.shape
    cube = g.reshape(size // ROWS, ROWS, width)
    place = jax.lax.broadcasted_iota(jnp.int32, cube.shape, 1)

    def from_before(x, shift, block):  # the token `shift` before, 0 where that is in another block
        return jnp.where(place & (block - 1) >= shift, pltpu.roll(x, shift, 1), 0.0)

    def from_after(x, shift, block):
        return jnp.where(place & (block - 1) < block - shift, pltpu.roll(x, ROWS - shift, 1), 0.0)

    def within(block):
        since, until, shift = cube, from_after(cube, 1, block), 1
        while shift < block:
            since = since + from_before(since, shift, block)
            until = until + from_after(until, shift, block) if block > 2 else until
            shift *= 2
        return since, until

    out = [(1, jnp.where(place & 1 != 0, cube, 0.0).reshape(size, width))]
    for m in (2, 4):
        since, until = within(m)
        out.append((m, jnp.where(place & m != 0, since, until).reshape(size, width)))
    since, until = (x.reshape(size, width) for x in within(ROWS))
    m = ROWS
    while m < size:
        blocks = range(0, size, m)
        first = [since[b : b + m] for b in blocks]
        second = [until[b : b + m] for b in blocks]
        out.append((m, jnp.concatenate([first[n] if n % 2 else second[n] for n in range(len(first))])))
        for n in range(0, len(first), 2):
            start, end = first[n][-1:], first[n + 1][-1:]
            first[n + 1], second[n] = first[n + 1] + start, second[n] + end
        since, until = jnp.concatenate(first), jnp.concatenate(second)
        m *= 2
    return out, since, until


def vector_forward(q, k, v, g, state):
    """y and the next state [V K] of a chunk, from the one before; g [C K] float32."""
    dtype, size = q.dtype, q.shape[0]
    levels, since, until = stretches(g)
    wide_q, wide_k = q.astype(jnp.float32), k.astype(jnp.float32)
    row, column = rows_columns(size)
    apart = row ^ column  # its highest bit is the level at which a pair meets
    pairs = jnp.where(apart == 0, dot(q, k, (1, 1)), 0.0)
    for m, x in levels:
        decay = jnp.exp(x)
        queries, keys = (wide_q * decay).astype(dtype), (wide_k * decay).astype(dtype)
        meet = (apart >= m) & (apart < 2 * m) & (row > column)
        pairs = jnp.where(meet, dot(queries, keys, (1, 1)), pairs)
    y = dot(pairs.astype(dtype), v) + dot((wide_q * jnp.exp(since)).astype(dtype), state.astype(dtype), (1, 1))
    keys = (wide_k * jnp.exp(until)).astype(dtype)
    return y, jnp.exp(since[-1:]) * state + dot(v, keys, (0, 0))


def next_state_vector(k, v, g, state):
    """The next state [V K] alone."""
    _, since, until = stretches(g)
    keys = (k.astype(jnp.float32) * jnp.exp(until)).astype(k.dtype)
    return jnp.exp(since[-1:]) * state + dot(v, keys, (0, 0))


def vector_backward(q, k, v, dy, g, state, dstate):
    """Gradients of q, k, v, g and of the state before, from those of y and of the state after."""
    dtype, size = q.dtype, q.shape[0]
    exact = dtype == jnp.float32
    levels, since, until = stretches(g)
    wide_q, wide_k = q.astype(jnp.float32), k.astype(jnp.float32)
    row, column = rows_columns(size)
    apart = row ^ column
    low, dlow = state.astype(dtype), dstate.astype(dtype)
    from_start, to_end, whole = jnp.exp(since), jnp.exp(until), jnp.exp(since[-1:])
    queries, keys = (wide_q * from_start).astype(dtype), (wide_k * to_end).astype(dtype)
    weights = dot(dy, v, (1, 1))  # [t s]
    weights_t = dot(v, dy, (1, 1))  # [s t]
    pairs_t = jnp.where(apart == 0, dot(k, q, (1, 1)), 0.0)
    same = jnp.where(apart == 0, weights, 0.0).astype(dtype)
    dqueries, dkeys = dot(dy, low), dot(v, dlow)
    dq = dqueries * from_start + dot(same, k)
    dk = dkeys * to_end + dot(same, q)
    dnext = whole * dstate + dot(dy, queries, (0, 0))
    # a decay g_i is in the sums since the start of the queries t >= i, until the end of the keys s < i, and the whole
    dsince, duntil = dqueries * from_start * wide_q, dkeys * to_end * wide_k
    dg = sums_left(column >= row, dsince, exact) + sums_left(column < row, duntil, exact)
    dg = dg + whole * (state * dstate).sum(0, keepdims=True)
    for m, x in levels:
        decay = jnp.exp(x)
        wide_queries, wide_keys = wide_q * decay, wide_k * decay
        level_queries, level_keys = wide_queries.astype(dtype), wide_keys.astype(dtype)
        meet = (apart >= m) & (apart < 2 * m)
        pairs_t = jnp.where(meet & (column > row), dot(level_keys, level_queries, (1, 1)), pairs_t)
        dpairs = jnp.where(meet & (row > column), weights, 0.0).astype(dtype)
        dpairs_t = jnp.where(meet & (column > row), weights_t, 0.0).astype(dtype)
        dlevel_q, dlevel_k = dot(dpairs, level_keys), dot(dpairs_t, level_queries)
        dq, dk = dq + dlevel_q * decay, dk + dlevel_k * decay
        dx = dlevel_q * wide_queries + dlevel_k * wide_keys
        inside = (apart < m) & (((row & m != 0) & (column >= row)) | ((row & m == 0) & (column < row)))
        dg = dg + sums_left(inside, dx, exact)
    dv = dot(pairs_t.astype(dtype), dy) + dot(keys, dlow, (1, 1))
    return dq, dk, dv, dg, dnext
