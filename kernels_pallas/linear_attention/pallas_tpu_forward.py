"""The forward TPU kernel: chunks in order, the state in VMEM. README.md has the derivation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import mosaic_tpu
from kernels_pallas.linear_attention.pallas_tpu_chunk import dot, rows_columns, sums
from kernels_pallas.linear_attention.pallas_tpu_normalized import normalized_forward
from kernels_pallas.linear_attention.pallas_tpu_vector import vector_forward
from kernels_pallas.linear_attention.tiles import VMEM, WORKING, Plan


def forward(plan: Plan, q, k, v, g, state, *, save: bool, cost: pl.CostEstimate):
    """y [B T H*V] in the dtype of v, the last state [B H V K] and with `save` those before each grid step [B N H V K].

    q, k [B T H*K]; state [B H V K], with the key channels in the lanes; g None, float32 rows [B H N 1 L] of a decay a
    head, or [B T H*K] of one a channel in any float dtype. With plan.normalize y is divided, and the states have the
    rows of z below those of the values.
    """
    batch, length, _ = q.shape
    heads, size = state.shape[1], plan.chunk * plan.chunks
    steps, n = length // size, plan.heads
    tokens = lambda width: pl.BlockSpec((1, size, n * width), lambda b, h, j: (b, j, h))  # noqa: E731
    whole = pl.BlockSpec((1, n, *state.shape[2:]), lambda b, h, j: (b, h, 0, 0))
    row = pl.BlockSpec((1, n, 1, 1, size), lambda b, h, j: (b, h, j, 0, 0))
    decay = {None: [], "head": [row], "channel": [tokens(plan.key_width)]}[plan.decay]
    out_specs = [tokens(plan.value_width), whole]
    out_shape = [jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32)]
    if save:
        out_specs.append(pl.BlockSpec((1, 1, n, *state.shape[2:]), lambda b, h, j: (b, j, h, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((batch, steps, *state.shape[1:]), jnp.float32))
    inputs = [q, k, v, *([] if g is None else [g]), state]
    return mosaic_tpu.call(
        functools.partial(_kernel, plan=plan, steps=steps, save=save),
        name="linear_attention_forward",
        grid=(batch, heads // n, steps),
        in_specs=[tokens(plan.key_width), tokens(plan.key_width), tokens(plan.value_width), *decay, whole],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((n, *state.shape[2:]), jnp.float32)],
        semantics=("parallel", "parallel", "arbitrary"),
        cost=cost,
        interpret=plan.interpret,
        dtypes=[x.dtype for x in inputs],
        vmem=VMEM,
        working=WORKING,
    )(*inputs)


def _kernel(*refs, plan: Plan, steps: int, save: bool):
    q_ref, k_ref, v_ref, *rest = refs
    g_ref: Any = rest.pop(0) if plan.decay else None
    first_ref, y_ref, last_ref, *saved, state_ref = rest
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        state_ref[...] = first_ref[0]

    if save:
        saved[0][0, 0] = state_ref[...]
    states = [state_ref[h] for h in range(plan.heads)]
    for c in range(plan.chunks):
        here = slice(c * plan.chunk, (c + 1) * plan.chunk)
        for h in range(plan.heads):
            keys = slice(h * plan.key_width, (h + 1) * plan.key_width)
            values = slice(h * plan.value_width, (h + 1) * plan.value_width)
            q, k, v = q_ref[0, here, keys], k_ref[0, here, keys], v_ref[0, here, values]
            if plan.normalize:
                g = g_ref[0, h, 0, :, here] if plan.decay else None
                y, states[h] = normalized_forward(q, k, v, g, states[h])
            elif plan.decay is None:
                y, states[h] = _plain(q, k, v, states[h])
            elif plan.decay == "head":
                y, states[h] = _head(q, k, v, g_ref[0, h, 0, :, here], states[h])
            else:
                y, states[h] = vector_forward(q, k, v, g_ref[0, here, keys], states[h])
            y_ref[0, here, values] = y.astype(y_ref.dtype)
    for h in range(plan.heads):
        state_ref[h] = states[h]

    @pl.when(step == steps - 1)
    def _():
        last_ref[0] = state_ref[...]


def _plain(q, k, v, state):
    row, column = rows_columns(q.shape[0])
    pairs = jnp.where(column <= row, dot(q, k, (1, 1)), 0.0).astype(v.dtype)
    y = dot(pairs, v) + dot(q, state.astype(q.dtype), (1, 1))
    return y, state + dot(v, k, (0, 0))


def _head(q, k, v, g, state):
    """As _plain with the row g [1 C] of log decays."""
    exact = q.dtype == jnp.float32
    row, column = rows_columns(q.shape[0])
    between = sums(jnp.where(column <= row, g, 0.0), column < row, exact, passes=2)  # [t s]: g_{s+1} + ... + g_t
    since = between[:, :1] + g[:, :1]
    decay = jnp.where(column <= row, jnp.exp(between), 0.0)
    pairs = (dot(q, k, (1, 1)) * decay).astype(v.dtype)
    y = dot(pairs, v) + jnp.exp(since) * dot(q, state.astype(q.dtype), (1, 1))
    until = jnp.exp(between[-1:])  # [1 s]
    values = (v.astype(jnp.float32).T * until).astype(v.dtype)  # [V s]
    return y, jnp.exp(since[-1:]) * state + dot(values, k)
