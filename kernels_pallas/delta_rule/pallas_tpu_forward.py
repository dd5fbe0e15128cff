"""The forward kernel of the delta rule on TPU: a few heads and chunks a grid step, the states in VMEM. README.md."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import mosaic_tpu
from kernels_pallas.delta_rule.pallas_tpu_chunk import decayed_keys, dot, within_chunks
from kernels_pallas.delta_rule.tiles import Plan


def forward(plan: Plan, q, k, v, gates, state, *, save: bool, cost):
    """y [B T H*V], the last state [B H K V] float32 and, if `save`, the states before each chunk [B chunks H K V].

    q, k [B T H*K]; v [B T H*V]; gates [B H/n chunks R C] float32: n rows of beta, then n of the log decay.
    """
    batch, length, _ = q.shape
    heads, chunk, per, width, deep = plan.heads, plan.chunk, plan.per_step, plan.key_width, plan.value_width
    groups, steps = gates.shape[1], length // (chunk * per)

    def tokens(size):
        return pl.BlockSpec((1, per * chunk, heads * size), lambda b, h, c: (b, c, h))

    one_state = pl.BlockSpec((1, heads, width, deep), lambda b, h, c: (b, h, 0, 0))
    in_specs = [
        tokens(width),
        tokens(width),
        tokens(deep),
        pl.BlockSpec((1, 1, per, gates.shape[3], chunk), lambda b, h, c: (b, h, c, 0, 0)),
        one_state,
    ]
    out_specs = [tokens(deep), one_state]
    out_shape = [jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32)]
    if save:
        out_specs.append(pl.BlockSpec((1, per, heads, width, deep), lambda b, h, c: (b, c, h, 0, 0)))
        shape = (batch, steps * per, groups * heads, width, deep)
        out_shape.append(jax.ShapeDtypeStruct(shape, q.dtype))
    return mosaic_tpu.call(
        functools.partial(_kernel, plan=plan),
        name="delta_rule_forward",
        grid=(batch, groups, steps),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        semantics=("parallel", "parallel", "arbitrary"),
        cost=cost,
        interpret=plan.interpret,
        vmem=plan.vmem,
        working=plan.working,
        dtypes=[q.dtype, q.dtype, v.dtype, jnp.float32, jnp.float32],
    )(q, k, v, gates, state)


def _kernel(q_ref, k_ref, v_ref, gates_ref, start_ref, y_ref, state_ref, *saved, plan: Plan):
    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = start_ref[...]

    heads, chunk, deep, dtype = plan.heads, plan.chunk, plan.value_width, q_ref.dtype
    each = range(heads)
    within = within_chunks(plan, q_ref, k_ref, gates_ref)
    states = [state_ref[0, h] for h in each]
    for j in range(plan.per_step):
        parts, rows = within[j * heads : (j + 1) * heads], pl.ds(j * chunk, chunk)
        before = [x.astype(dtype) for x in states]
        if saved:
            for h in each:
                saved[0][0, j, h] = before[h]
        found = [dot("nn", jnp.concatenate([x.k, x.q], 0), s, dtype) for x, s in zip(parts, before)]  # [2C V]
        found_k, found_q = [x[:chunk] for x in found], [x[chunk:] for x in found]
        if plan.gated:
            found_k = [x.since_start * y for x, y in zip(parts, found_k)]
            found_q = [x.since_start * y for x, y in zip(parts, found_q)]
        values = [v_ref[0, rows, h * deep : (h + 1) * deep].astype(jnp.float32) for h in each]
        missing = [x.beta * (v - y) for x, v, y in zip(parts, values, found_k)]
        updates = [dot("nn", x.inverse, y, dtype).astype(dtype) for x, y in zip(parts, missing)]  # [C V]
        written = [dot("tn", decayed_keys(x), u, dtype) for x, u in zip(parts, updates)]
        within_read = [dot("nn", x.reads, u, dtype) for x, u in zip(parts, updates)]
        for h in each:
            y_ref[0, rows, h * deep : (h + 1) * deep] = (found_q[h] + within_read[h]).astype(y_ref.dtype)
            states[h] = (parts[h].total * states[h] if plan.gated else states[h]) + written[h]
    for h in each:
        state_ref[0, h] = states[h]
