"""The delta rule on TPU (Pallas Mosaic TPU): layout, padding and the gradient rule. README.md has the derivation."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import costs, mosaic_tpu
from kernels_pallas.delta_rule import tiles
from kernels_pallas.delta_rule.pallas_tpu_backward import backward
from kernels_pallas.delta_rule.pallas_tpu_chunk import FORGET
from kernels_pallas.delta_rule.pallas_tpu_forward import forward
from kernels_pallas.delta_rule.tiles import Plan, Plans


def delta_rule_tpu(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"] | None,
    state: Float[Array, "B H K V"],
    *,
    chunk: int | None = None,
    units: int | None = None,
    interpret: mosaic_tpu.Interpret | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """y in the dtype of v and the last state of api.delta_rule.

    Args:
      chunk: tokens a chunk, a power of two from 8 to 256. units: heads times chunks a grid step.
      interpret: as mosaic_tpu.call; None as the context says.

    Raises:
      NotImplementedError: float16, or states too wide for VMEM.
    """
    mosaic_tpu.refuse_float16("delta_rule", q, k, v)
    dtype = jnp.result_type(q, k, v)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    length, heads, width = q.shape[1:]
    if length == 0:
        return v, state
    mode = mosaic_tpu.interpreted() if interpret is None else interpret
    plans = tiles.plan(length, heads, width, v.shape[-1], dtype, log_decay is not None, mode, chunk, units)
    return _padded(plans, q, k, v, beta, log_decay, state)


@functools.partial(jax.jit, static_argnums=0)
def _padded(plans: Plans, q, k, v, beta, log_decay, state):
    """Fills up lengths and widths with zeros, which write nothing, and cuts the results."""
    length, value_width = v.shape[1], v.shape[-1]
    plan = plans.forward
    more = -length % (plan.chunk * max(each.per_step for each in plans))  # powers of two
    key_more, value_more = plan.key_width - q.shape[-1], plan.value_width - value_width

    def fill(x, *ends):
        return jnp.pad(x, [(0, end) for end in ends]) if any(ends) else x

    q, k = (fill(x, 0, more, 0, key_more) for x in (q, k))
    v = fill(v, 0, more, 0, value_more)
    gates = [fill(x.astype(jnp.float32), 0, more, 0) for x in (beta, log_decay) if x is not None]
    y, last = _delta(plans, q, k, v, gates, fill(state, 0, 0, key_more, value_more))
    return y[:, :length, :, :value_width], last[:, :, : state.shape[2], :value_width]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _delta(plans: Plans, q, k, v, gates, state):
    return _forward(plans.forward, q, k, v, gates, state, save=False)[:2]


def _forward(plan: Plan, q, k, v, gates, state, save):
    cost = _cost(plan, q, v, backward=False)
    y, *rest = forward(plan, _flat(q), _flat(k), _flat(v), _rows(plan, gates), state, save=save, cost=cost)
    return y.reshape(v.shape), *rest


def _save(plans: Plans, q, k, v, gates, state):
    y, last, states = _forward(plans.forward, q, k, v, gates, state, save=True)
    return (y, last), (q, k, v, gates, states)


def _backward(plans: Plans, saved, cotangents):
    plan = plans.backward
    q, k, v, gates, states = saved
    dy, dlast = cotangents
    cost = _cost(plan, q, v, backward=True)
    dq, dk, dv, dgates, dstate = backward(
        plan, _flat(q), _flat(k), _flat(v), _flat(dy), _rows(plan, gates), states, dlast, cost=cost
    )
    dgates = _unrows(plan, dgates, len(gates))
    if plan.gated:  # at or below FORGET nothing changes
        dgates[1] = jnp.where(gates[1] >= FORGET, dgates[1], 0.0)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), dgates, dstate


_delta.defvjp(_save, _backward)


def _cost(plan: Plan, q, v, *, backward):
    sizes, options = (*q.shape, v.shape[-1]), {"chunk": plan.chunk, "gated": plan.gated, "itemsize": q.dtype.itemsize}
    return costs.delta_rule(*sizes, **options, backward=backward).estimate()


def _flat(x):
    """[B T H K] -> [B T H*K], which moves nothing."""
    return x.reshape(*x.shape[:2], -1)


def _rows(plan: Plan, gates):
    """[B T H] of each gate -> [B H/n chunks R C], n rows a gate, filled up to a multiple of 8."""
    batch, length = gates[0].shape[:2]
    gates = [gates[0], *(jnp.maximum(x, FORGET) for x in gates[1:])]
    rows = jnp.stack([x.reshape(batch, length // plan.chunk, plan.chunk, -1, plan.heads) for x in gates], -2)
    rows = rows.reshape(*rows.shape[:4], -1).transpose(0, 3, 1, 4, 2)
    return jnp.pad(rows, [(0, 0)] * 3 + [(0, -rows.shape[3] % 8), (0, 0)])


def _unrows(plan: Plan, rows, count):
    """The transpose of _rows."""
    batch, groups, chunks = rows.shape[:3]
    rows = rows[:, :, :, : count * plan.heads].reshape(batch, groups, chunks, count, plan.heads, plan.chunk)
    return list(rows.transpose(3, 0, 2, 5, 1, 4).reshape(count, batch, chunks * plan.chunk, groups * plan.heads))
