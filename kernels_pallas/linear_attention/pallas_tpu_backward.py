"""The backward TPU kernel: chunks in reverse order, the state's gradient in VMEM. README.md has the derivation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import mosaic_tpu
from kernels_pallas.linear_attention.pallas_tpu_chunk import dot, rows_columns, sums
from kernels_pallas.linear_attention.pallas_tpu_normalized import next_state_normalized, normalized_backward
from kernels_pallas.linear_attention.pallas_tpu_vector import next_state_vector, vector_backward
from kernels_pallas.linear_attention.tiles import VMEM, WORKING, Plan


def backward(plan: Plan, q, k, v, y, dy, g, states, dlast, *, cost: pl.CostEstimate):
    """Gradients of q, k, v, g (None without decay) and of the first state [B H V K].

    Layouts as in `forward`; states [B N H V K] are those before each grid step, dlast the last state's gradient;
    y the outputs, which plan.normalize alone needs, else None.
    """
    batch, length, _ = q.shape
    heads, size = dlast.shape[1], plan.chunk * plan.chunks
    steps, n = length // size, plan.heads
    tokens = lambda width: pl.BlockSpec((1, size, n * width), lambda b, h, j: (b, steps - 1 - j, h))  # noqa: E731
    keys, values = tokens(plan.key_width), tokens(plan.value_width)
    whole = pl.BlockSpec((1, n, *dlast.shape[2:]), lambda b, h, j: (b, h, 0, 0))
    before = pl.BlockSpec((1, 1, n, *dlast.shape[2:]), lambda b, h, j: (b, steps - 1 - j, h, 0, 0))
    row = pl.BlockSpec((1, n, 1, 1, size), lambda b, h, j: (b, h, steps - 1 - j, 0, 0))
    decay = {None: [], "head": [row], "channel": [keys]}[plan.decay]
    inputs = [q, k, v, dy, *([] if y is None else [y]), *([] if g is None else [g]), states, dlast]
    outs = [q, k, v, *([] if g is None else [g]), dlast]
    dq, dk, dv, *dg, dstate = mosaic_tpu.call(
        functools.partial(_kernel, plan=plan, steps=steps),
        name="linear_attention_backward",
        grid=(batch, heads // n, steps),
        in_specs=[keys, keys, values, values, *([] if y is None else [values]), *decay, before, whole],
        out_specs=[keys, keys, values, *decay, whole],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outs],
        scratch_shapes=[
            pltpu.VMEM((n, *dlast.shape[2:]), jnp.float32),
            pltpu.VMEM((plan.chunks, n, *dlast.shape[2:]), jnp.float32),
        ],
        semantics=("parallel", "parallel", "arbitrary"),
        cost=cost,
        interpret=plan.interpret,
        dtypes=[x.dtype for x in inputs],
        vmem=VMEM,
        working=WORKING,
    )(*inputs)
    return dq, dk, dv, dg[0] if dg else None, dstate


def _kernel(*refs, plan: Plan, steps: int):
    q_ref, k_ref, v_ref, dy_ref, *rest = refs
    y_ref: Any = rest.pop(0) if plan.normalize else None
    g_ref: Any = rest.pop(0) if plan.decay else None
    before_ref, dlast_ref, dq_ref, dk_ref, dv_ref, *rest = rest
    dg_ref: Any = rest.pop(0) if plan.decay else None
    dfirst_ref, dstate_ref, states_ref = rest
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        dstate_ref[...] = dlast_ref[0]

    def place(c, h):
        here = slice(c * plan.chunk, (c + 1) * plan.chunk)
        keys = slice(h * plan.key_width, (h + 1) * plan.key_width)
        values = slice(h * plan.value_width, (h + 1) * plan.value_width)
        decay = (0, h, 0, slice(None), here) if plan.decay == "head" else (0, here, keys)
        return (0, here, keys), (0, here, values), decay

    for h in range(plan.heads):  # the states before each chunk again
        states_ref[0, h] = before_ref[0, 0, h]
    for c in range(plan.chunks - 1):
        for h in range(plan.heads):
            keys, values, decay = place(c, h)
            g = None if g_ref is None else g_ref[decay]
            after: Any = {None: _next_state, "head": _next_state_head, "channel": next_state_vector}[plan.decay]
            after = next_state_normalized if plan.normalize else after
            states_ref[c + 1, h] = after(k_ref[keys], v_ref[values], g, states_ref[c, h])

    dstates = [dstate_ref[h] for h in range(plan.heads)]
    for c in reversed(range(plan.chunks)):
        for h in range(plan.heads):
            keys, values, decay = place(c, h)
            q, k, v, dy = q_ref[keys], k_ref[keys], v_ref[values], dy_ref[values]
            state = states_ref[c, h]
            if plan.normalize:
                g = g_ref[decay] if plan.decay else None
                args = (q, k, v, y_ref[values], dy, g, state, dstates[h])
                dq, dk, dv, dg, dstates[h] = normalized_backward(*args)
                if plan.decay:
                    dg_ref[decay] = dg
            elif plan.decay is None:
                dq, dk, dv, dstates[h] = _plain(q, k, v, dy, state, dstates[h])
            elif plan.decay == "head":
                dq, dk, dv, dg_ref[decay], dstates[h] = _head(q, k, v, dy, g_ref[decay], state, dstates[h])
            else:
                dq, dk, dv, dg, dstates[h] = vector_backward(q, k, v, dy, g_ref[decay], state, dstates[h])
                dg_ref[decay] = dg.astype(dg_ref.dtype)
            dq_ref[keys] = dq.astype(dq_ref.dtype)
            dk_ref[keys] = dk.astype(dk_ref.dtype)
            dv_ref[values] = dv.astype(dv_ref.dtype)
    for h in range(plan.heads):
        dstate_ref[h] = dstates[h]

    @pl.when(step == steps - 1)
    def _():
        dfirst_ref[0] = dstate_ref[...]


def _next_state(k, v, g, state):
    return state + dot(v, k, (0, 0))


def _plain(q, k, v, dy, state, dstate):
    """Pairs are [s t], keys in rows, but for the gradient of q."""
    dtype = q.dtype
    row, column = rows_columns(q.shape[0])
    later = column >= row
    pairs = jnp.where(later, dot(k, q, (1, 1)), 0.0).astype(dtype)
    dpairs = jnp.where(later, dot(v, dy, (1, 1)), 0.0).astype(dtype)
    dpairs_t = jnp.where(column <= row, dot(dy, v, (1, 1)), 0.0).astype(dtype)
    low, dlow = state.astype(dtype), dstate.astype(dtype)
    dq = dot(dpairs_t, k) + dot(dy, low)
    dk = dot(dpairs, q) + dot(v, dlow)
    dv = dot(pairs, dy) + dot(k, dlow, (1, 1))
    return dq, dk, dv, dstate + dot(dy, q, (0, 0))


def _until(g):
    """[C 1] of the sum of decays after each token, from the row g [1 C]."""
    row, column = rows_columns(g.shape[1])
    return jnp.where(column > row, g, 0.0).sum(1, keepdims=True)


def _next_state_head(k, v, g, state):
    keys = (k.astype(jnp.float32) * jnp.exp(_until(g))).astype(k.dtype)
    return jnp.exp(g.sum(1, keepdims=True)) * state + dot(v, keys, (0, 0))


def _head(q, k, v, dy, g, state, dstate):
    dtype = q.dtype
    exact = dtype == jnp.float32
    row, column = rows_columns(q.shape[0])
    between = sums(jnp.where(column > row, g, 0.0), row <= column, exact, passes=2)  # [s t]: g_{s+1} + ... + g_t
    decay = jnp.where(column >= row, jnp.exp(between), 0.0)
    until = jnp.exp(between[:, -1:])  # [s 1]
    since = jnp.exp(jnp.where(column <= row, g, 0.0).sum(1, keepdims=True))  # [t 1]
    total = jnp.exp(between[:1, -1:] + g[:, :1])
    low, dlow = state.astype(dtype), dstate.astype(dtype)
    pairs = dot(k, q, (1, 1)) * decay
    dweights = dot(v, dy, (1, 1))
    dpairs = (dweights * decay).astype(dtype)
    dq_state = since * dot(dy, low)
    dk_state = until * dot(v, dlow)
    dq = dot(dpairs, k, (0, 0)) + dq_state
    dk = dot(dpairs, q) + dk_state
    dv = dot(pairs.astype(dtype), dy) + until * dot(k, dlow, (1, 1))
    queries = (q.astype(jnp.float32) * since).astype(dtype)
    dnext = total * dstate + dot(dy, queries, (0, 0))
    # a decay g_i lies between the pairs with s < i <= t, before the queries t >= i and after the keys s < i
    crossing = sums(dweights * pairs, row >= column, exact)  # [s i]: pairs of the key s with t >= i
    after = (dq_state * q.astype(jnp.float32)).sum(1, keepdims=True)
    before = (dk_state * k.astype(jnp.float32)).sum(1, keepdims=True)
    dg = jnp.where(row >= column, after, before + crossing).sum(0, keepdims=True)
    whole = (state * dstate).sum(0, keepdims=True).sum(1, keepdims=True)
    return dq, dk, dv, dg + total * whole, dnext
