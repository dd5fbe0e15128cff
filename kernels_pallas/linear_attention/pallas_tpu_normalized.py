"""A chunk of the TPU kernels whose outputs are divided by z_t . q_t. README.md has the derivation.

The state is [V + ROWS, K]: S^T, and below it ROWS equal rows of which the first is z, the decayed sum of the keys.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.linear_attention.pallas_tpu_chunk import dot, parts, rows_columns, sums

Array = jax.Array

ROWS, LANES = 8, 128  # of a register


def _grow(state: Array, total: Array | None, products: Array, row: Array) -> Array:
    """total * state, plus products [V K] in its upper part and the row [1 K] or rows [ROWS K] in the others."""
    more = jnp.concatenate([products, jnp.broadcast_to(row, (ROWS, row.shape[1]))])
    return more + (state if total is None else total * state)


def _decays(g: Array, exact: bool) -> tuple[Array, Array, Array]:
    """From a row g [1 C]: the sums over s < i <= t [t s]; exp of the sums up to each token [C 1]; and of the whole."""
    row, column = rows_columns(g.shape[1])
    between = sums(jnp.where(column <= row, g, 0.0), column < row, exact, passes=2)
    since = jnp.exp(between[:, :1] + g[:, :1])
    return between, since, since[-1:]


def _sum(*terms: Array) -> Array:
    """[C 1]: the sum of all columns of all terms, lane by lane before any reduction across them."""
    if any(x.shape[1] % LANES for x in terms):
        return sum((x.sum(1, keepdims=True) for x in terms[1:]), start=terms[0].sum(1, keepdims=True))
    first, *rest = [x[:, n : n + LANES] for x in terms for n in range(0, x.shape[1], LANES)]
    return sum(rest, start=first).sum(1, keepdims=True)


def _decayed_sums(k: Array, v: Array, until: Array) -> tuple[Array, Array]:
    """sum_s until_s v_s k_s^T [V K] and sum_s until_s k_s, ROWS times, for a row `until` [1 C]."""
    values = (v.astype(jnp.float32).T * until).astype(v.dtype)
    rows = jnp.broadcast_to(until, (ROWS, until.shape[1]))
    if k.dtype == jnp.float32:
        return dot(values, k), dot(rows, k)
    high, low = parts(rows, 2)
    return dot(values, k), dot(high, k) + dot(low, k)


def _until(g: Array) -> Array:
    """[C 1] of exp of the sum of decays after each token, from the row g [1 C]."""
    row, column = rows_columns(g.shape[1])
    return jnp.exp(jnp.where(column > row, g, 0.0).sum(1, keepdims=True))


def _inverse(total: Array) -> Array:
    return jnp.where(total == 0, 0.0, 1.0 / jnp.where(total == 0, 1.0, total))


def normalized_forward(q: Array, k: Array, v: Array, g: Array | None, state: Array) -> tuple[Array, Array]:
    """y, divided, and the next state of a chunk, from the one before; g None or a row [1 C] of log decays."""
    row, column = rows_columns(q.shape[0])
    memory, z = state[: v.shape[1]], state[v.shape[1] :][:1]
    pairs = dot(q, k, (1, 1))
    old = dot(q, memory.astype(q.dtype), (1, 1))
    old_totals = q.astype(jnp.float32) * z
    if g is None:
        pairs = jnp.where(column <= row, pairs, 0.0)
        after = _grow(state, None, dot(v, k, (0, 0)), k.astype(jnp.float32).sum(0, keepdims=True))
    else:
        between, since, whole = _decays(g, q.dtype == jnp.float32)
        pairs = pairs * jnp.where(column <= row, jnp.exp(between), 0.0)
        old, old_totals = since * old, since * old_totals
        after = _grow(state, whole, *_decayed_sums(k, v, jnp.exp(between[-1:])))
    y = dot(pairs.astype(v.dtype), v) + old
    return y * _inverse(_sum(pairs, old_totals)), after


def next_state_normalized(k: Array, v: Array, g: Array | None, state: Array) -> Array:
    """The next state alone."""
    wide_k = k.astype(jnp.float32)
    if g is None:
        return _grow(state, None, dot(v, k, (0, 0)), wide_k.sum(0, keepdims=True))
    keys = _until(g) * wide_k
    products = dot(v, keys.astype(k.dtype), (0, 0))
    return _grow(state, jnp.exp(g.sum(1, keepdims=True)), products, keys.sum(0, keepdims=True))


def normalized_backward(q, k, v, y, dy, g, state, dstate):
    """Gradients of q, k, v, g (None without decay) and of the state before; pairs are [t s], queries in rows."""
    dtype, values = q.dtype, v.shape[1]
    exact = dtype == jnp.float32
    row, column = rows_columns(q.shape[0])
    earlier = column <= row
    wide_q, wide_k = q.astype(jnp.float32), k.astype(jnp.float32)
    memory, z = state[:values], state[values:][:1]
    dmemory, dz = dstate[:values], dstate[values:][:1]
    pairs = dot(q, k, (1, 1))
    since: Any = None
    until: Any = None
    whole: Any = None
    if g is None:
        decay = jnp.where(earlier, 1.0, 0.0)
    else:
        between, since, whole = _decays(g, exact)
        decay, until = jnp.where(earlier, jnp.exp(between), 0.0), _until(g)
    pairs = pairs * decay
    queries = wide_q if since is None else since * wide_q
    inverse = _inverse(_sum(pairs, queries * z))
    dsum = (dy.astype(jnp.float32) * inverse).astype(dtype)  # of the undivided outputs
    dtotal = -(dsum.astype(jnp.float32) * y.astype(jnp.float32)).sum(1, keepdims=True)
    dweights = dot(dsum, v, (1, 1)) + dtotal
    dpairs = (dweights * decay).astype(dtype)
    low, dlow = memory.astype(dtype), dmemory.astype(dtype)
    dq_state = dot(dsum, low) + dtotal * z
    dk_state = dot(v, dlow) + dz
    dv_state = dot(k, dlow, (1, 1))
    if g is not None:
        dq_state, dk_state, dv_state = since * dq_state, until * dk_state, until * dv_state
    dq = dot(dpairs, k) + dq_state
    dk = dot(dpairs, q, (0, 0)) + dk_state
    dv = dot(pairs.astype(dtype), dsum, (0, 0)) + dv_state
    before = dot(dsum, queries.astype(dtype), (0, 0))
    dnext = _grow(dstate, whole, before, (dtotal * queries).sum(0, keepdims=True))
    if g is None:
        return dq, dk, dv, None, dnext
    crossing = sums(dweights * pairs, row < column, exact)  # [t i]: pairs of the query t with s < i
    after = (dq_state * wide_q).sum(1, keepdims=True)
    until_term = (dk_state * wide_k).sum(1, keepdims=True)
    dg = jnp.where(earlier, after + crossing, until_term).sum(0, keepdims=True)
    products = (memory * dmemory).sum(0, keepdims=True) + z * dz
    return dq, dk, dv, dg + whole * products.sum(1, keepdims=True), dnext
