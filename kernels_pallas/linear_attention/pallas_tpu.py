"""Linear attention on TPU (Pallas Mosaic TPU): layout, padding and the gradient rule. README.md has the derivation."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import costs, dispatch, mosaic_tpu
from kernels_pallas.linear_attention import tiles
from kernels_pallas.linear_attention.pallas_tpu_backward import backward
from kernels_pallas.linear_attention.pallas_tpu_chunk import FORGET
from kernels_pallas.linear_attention.pallas_tpu_forward import forward
from kernels_pallas.linear_attention.pallas_tpu_normalized import ROWS
from kernels_pallas.linear_attention.tiles import Plan


def linear_attention_tpu(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None,
    state: Float[Array, "B H K W"],
    *,
    normalize: bool = False,
    chunk: int | None = None,
    step: int | None = None,
    heads: int | None = None,
    interpret: mosaic_tpu.Interpret | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K W"]]:
    """y in the dtype of v and the last state of api.linear_attention.

    Args:
      normalize: as there, W = V + 1; without it W = V. A decay a channel takes a column of ones instead.
      chunk: tokens that meet in one matrix product, a power of two from 16 to 512.
      step, heads: tokens and heads a grid step, at most; one state a step is kept for the backward pass.
      interpret: as mosaic_tpu.call; None as the context says.

    Raises:
      NotImplementedError: float16, or heads too wide for VMEM.
    """
    mosaic_tpu.refuse_float16("linear_attention", q, k, v)
    dtype = jnp.result_type(q, k, v)
    decay = None if log_decay is None else "head" if log_decay.ndim == 3 else "channel"
    if normalize and decay == "channel":
        raise NotImplementedError("linear_attention: normalize with a decay a channel; append a column of ones to v")
    plan = tiles.choose(
        q.shape,
        v.shape[-1],
        dtype,
        decay,
        dispatch.device_kind(),
        chunk=chunk,
        step=step,
        heads=heads,
        normalize=normalize,
        interpret=mosaic_tpu.interpreted() if interpret is None else interpret,
    )
    y, last = _padded(plan, *(x.astype(dtype) for x in (q, k, v)), log_decay, state)
    return y.astype(v.dtype), last


@functools.partial(jax.jit, static_argnums=0)
def _padded(plan: Plan, q, k, v, g, state):
    """Fills up lengths and widths with zeros, which write nothing and decay nothing, and cuts the results."""
    (_, length, _, key_width), value_width = q.shape, v.shape[-1]
    more = -length % (plan.chunk * plan.chunks)
    keys, values = plan.key_width - key_width, plan.value_width - value_width
    q, k, v = _fill(q, 0, more, 0, keys), _fill(k, 0, more, 0, keys), _fill(v, 0, more, 0, values)
    if g is not None:
        g = _fill(g, 0, more, 0, *([keys] if g.ndim == 4 else []))
    state = state.swapaxes(2, 3)
    sums = state[:, :, value_width:]  # z, or nothing
    state = _fill(state[:, :, :value_width], 0, 0, values, keys)
    if plan.normalize:
        state = jnp.concatenate([state, _fill(sums, 0, 0, ROWS - 1, keys)], 2)
    y, last = _attend(plan, q, k, v, g, state)
    memory = last[:, :, :value_width, :key_width]
    if plan.normalize:
        z = last[:, :, plan.value_width : plan.value_width + 1, :key_width]
        memory = jnp.concatenate([memory, z], 2)
    return y[:, :length, :, :value_width], memory.swapaxes(2, 3)


def _fill(x, *ends):
    return jnp.pad(x, [(0, end) for end in ends]) if any(ends) else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, v, g, state):
    return _forward(plan, q, k, v, g, state, save=False)[:2]


def _forward(plan: Plan, q, k, v, g, state, save):
    cost = _cost(plan, q, v, backward=False)
    y, *rest = forward(plan, _flat(q), _flat(k), _flat(v), _rows(plan, g), state, save=save, cost=cost)
    return y.reshape(v.shape), *rest


def _save(plan: Plan, q, k, v, g, state):
    y, last, states = _forward(plan, q, k, v, g, state, save=True)
    return (y, last), (q, k, v, y if plan.normalize else None, g, states)


def _backward(plan: Plan, saved, cotangents):
    q, k, v, y, g, states = saved
    dy, dlast = cotangents
    cost = _cost(plan, q, v, backward=True)
    fewer = plan._replace(heads=plan.heads_backward)
    dq, dk, dv, dg, dstate = backward(
        fewer,
        *(_flat(q), _flat(k), _flat(v)),
        None if y is None else _flat(y),
        *(_flat(dy), _rows(plan, g), states, dlast),
        cost=cost,
    )
    if plan.decay == "head":
        batch, heads = dg.shape[:2]
        dg = dg.reshape(batch, heads, -1).swapaxes(1, 2)
        dg = jnp.where(g >= FORGET, dg, 0.0).astype(g.dtype)
    elif plan.decay == "channel":
        dg = dg.reshape(g.shape)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), dg, dstate


_attend.defvjp(_save, _backward)


def _cost(plan: Plan, q, v, *, backward):
    batch, length, heads, keys = q.shape
    sizes = (batch, length, heads, keys, v.shape[-1])
    options = {"chunk": plan.chunk, "decay": plan.decay, "itemsize": q.dtype.itemsize, "backward": backward}
    return costs.linear_attention(*sizes, **options).estimate()


def _flat(x):
    return x.reshape(*x.shape[:2], -1)


def _rows(plan: Plan, g):
    """As the kernels read it: [B T H] -> [B H N 1 L], a row of L tokens a grid step; [B T H K] -> [B T H*K].

    What is below FORGET is FORGET; in a decay a channel, as large as q, the kernels see to that.
    """
    if plan.decay is None:
        return None
    if plan.decay == "channel":
        return _flat(g)
    batch, _, heads = g.shape
    g = jnp.maximum(g.astype(jnp.float32), FORGET)
    return g.swapaxes(1, 2).reshape(batch, heads, -1, 1, plan.chunk * plan.chunks)
