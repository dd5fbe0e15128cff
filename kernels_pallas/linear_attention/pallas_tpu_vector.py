"""A chunk of the TPU kernels with a decay a key channel, by halves. README.md has the derivation."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.linear_attention.pallas_tpu_chunk import FORGET, dot, rows_columns, sums_left

Array = jax.Array

ROWS = 8  # of a register: stretches of fewer tokens are taken by masks, of more by whole registers
LOG2E = 1.4426950408889634  # the exponents are of 2, which is what the hardware has


def stretches(g: Array) -> tuple[list[tuple[int, Array]], Array, Array]:
    """Sums of the decays g [C K] of any float dtype, each of them direct; as exponents of 2.

    Returns:
      (m, x [C K]) for m = 1, 2, 4, ... C / 2: in stretches of m tokens, x is the sum since the start of an odd stretch
      up to and with each token, and until the end of an even one after each token: from a key s to a query t of the
      next stretch there is x_s + x_t.
      The sum since the start of the chunk up to and with each token, and until its end after each, [C K].
    """
    size, width = g.shape
    g = jnp.maximum(g.astype(jnp.float32), FORGET) * LOG2E
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


def _halves(x, m):
    """The rows of the even and of the odd stretches of m tokens, lists of [m *]."""
    parts = [x[n : n + m] for n in range(0, x.shape[0], m)]
    return parts[::2], parts[1::2]


def _merge(even, odd):
    return jnp.concatenate([x for pair in zip(even, odd) for x in pair])


def _alternate(even, odd, m):
    """Rows of `even` in the even stretches of m tokens and of `odd` in the odd ones."""
    if m >= ROWS:
        return _merge(_halves(even, m)[0], _halves(odd, m)[1])
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, even.shape, 0) & m != 0, odd, even)


def vector_forward(q, k, v, g, state):
    """y and the next state [V K] of a chunk, from the one before; g [C K]."""
    dtype, size = q.dtype, q.shape[0]
    levels, since, until = stretches(g)
    wide_q, wide_k = q.astype(jnp.float32), k.astype(jnp.float32)
    row, column = rows_columns(size)
    apart = jnp.where(row >= column, row ^ column, -1)  # the highest bit is the level at which a pair meets
    pairs = jnp.where(apart == 0, dot(q, k, (1, 1)), 0.0)
    for m, x in levels:
        both = (_alternate(wide_k, wide_q, m) * jnp.exp2(x)).astype(dtype)
        meet = apart & -m == m
        if m < ROWS:
            pairs = jnp.where(meet, dot(both, both, (1, 1)), pairs)
            continue
        joined = dot(jnp.concatenate(_halves(both, m)[1]), both, (1, 1))
        products = [joined[n : n + m] for n in range(0, size // 2, m)]
        even, odd = _halves(pairs, m)
        odd = [jnp.where(here, new, old) for here, new, old in zip(_halves(meet, m)[1], products, odd)]
        pairs = _merge(even, odd)
    y = dot(pairs.astype(dtype), v) + dot((wide_q * jnp.exp2(since)).astype(dtype), state.astype(dtype), (1, 1))
    keys = (wide_k * jnp.exp2(until)).astype(dtype)
    return y, jnp.exp2(since[-1:]) * state + dot(v, keys, (0, 0))


def next_state_vector(k, v, g, state):
    """The next state [V K] alone."""
    _, since, until = stretches(g)
    keys = (k.astype(jnp.float32) * jnp.exp2(until)).astype(k.dtype)
    return jnp.exp2(since[-1:]) * state + dot(v, keys, (0, 0))


def vector_backward(q, k, v, dy, g, state, dstate):
    """Gradients of q, k, v, g and of the state before, from those of y and of the state after."""
    dtype, size = q.dtype, q.shape[0]
    exact = dtype == jnp.float32
    levels, since, until = stretches(g)
    wide_q, wide_k, wide_dy = (x.astype(jnp.float32) for x in (q, k, dy))
    row, column = rows_columns(size)
    apart = row ^ column
    low, dlow = state.astype(dtype), dstate.astype(dtype)
    from_start, to_end, whole = jnp.exp2(since), jnp.exp2(until), jnp.exp2(since[-1:])
    queries, keys = wide_q * from_start, wide_k * to_end
    # a query and its own key, without decay
    pair = (wide_q * wide_k).sum(1, keepdims=True)
    dpair = (wide_dy * v.astype(jnp.float32)).sum(1, keepdims=True)
    dqueries, dkeys = dot(dy, low), dot(v, dlow)
    dq = dqueries * from_start + dpair * wide_k
    dk = dkeys * to_end + dpair * wide_q
    dnext = whole * dstate + dot(dy, queries.astype(dtype), (0, 0))
    # a decay g_i is in the sums since the start of the queries t >= i, until the end of the keys s < i, and the whole
    dg = sums_left(column >= row, dqueries * queries, exact) + sums_left(column < row, dkeys * keys, exact)
    dg = dg + whole * (state * dstate).sum(0, keepdims=True)
    # the gradient of the pairs, [t s] below the diagonal and [s t] above
    dweights = jnp.where(row > column, dot(dy, v, (1, 1)), dot(v, dy, (1, 1)))
    pairs = jnp.zeros((size, size), jnp.float32)  # [s t]
    for m, x in levels:
        decay = jnp.exp2(x)
        wide = _alternate(wide_k, wide_q, m) * decay
        both = wide.astype(dtype)
        meet = apart & -m == m
        dboth = dot(jnp.where(meet, dweights, 0.0).astype(dtype), both)
        dx, dboth = dboth * wide, dboth * decay
        inside = (apart < m) & (((row & m != 0) & (column >= row)) | ((row & m == 0) & (column < row)))
        dg = dg + sums_left(inside, dx, exact)
        if m < ROWS:
            pairs = jnp.where(meet & (column > row), dot(both, both, (1, 1)), pairs)
            odd = jax.lax.broadcasted_iota(jnp.int32, dboth.shape, 0) & m != 0
            dq, dk = dq + jnp.where(odd, dboth, 0.0), dk + jnp.where(odd, 0.0, dboth)
            continue
        joined = dot(jnp.concatenate(_halves(both, m)[0]), both, (1, 1))
        products = [joined[n : n + m] for n in range(0, size // 2, m)]
        (even, odd), (dk_even, dk_odd), (dq_even, dq_odd) = (_halves(x, m) for x in (pairs, dk, dq))
        (more_even, more_odd), meet_even = _halves(dboth, m), _halves(meet, m)[0]
        pairs = _merge([jnp.where(*x) for x in zip(meet_even, products, even)], odd)
        dk = _merge([a + b for a, b in zip(dk_even, more_even)], dk_odd)
        dq = _merge(dq_even, [a + b for a, b in zip(dq_odd, more_odd)])
    dv = dot(pairs.astype(dtype), dy) + pair * wide_dy + dot(keys.astype(dtype), dlow, (1, 1))
    return dq, dk, dv, jnp.where(g.astype(jnp.float32) >= FORGET, dg, 0.0), dnext
