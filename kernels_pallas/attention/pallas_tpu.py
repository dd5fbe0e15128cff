"""Attention on TPU (Pallas Mosaic TPU): layout, padding and the gradient rule. README.md has the derivation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import costs, dispatch, mosaic_tpu
from kernels_pallas.attention import tiles_tpu
from kernels_pallas.attention.pallas_tpu_backward import backward, fused, products
from kernels_pallas.attention.pallas_tpu_forward import forward
from kernels_pallas.attention.pallas_tpu_table import NONE, classify
from kernels_pallas.attention.pallas_tpu_tile import LOG2E
from kernels_pallas.attention.tiles_tpu import Plan, Sizes

LOWEST = -(2**31)  # the mark of keys that are never visible


def attention_tpu(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    bias: Float[Array, "#B #H #T #S"] | None,
    keep: Bool[Array, "B S"] | None,
    q_segments: Int[Array, "B T"] | None,
    k_segments: Int[Array, "B S"] | None,
    *,
    window: tuple[int | None, int | None],
    block_mask: Bool[np.ndarray, "J M N"] | None,
    scale: float,
    activation: str,
    forward: tuple[int, int, int, int] | None = None,
    backward: tuple[int, int, int, int] | None = None,
    interpret: mosaic_tpu.Interpret | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"] | None]:
    """y, lse of api.attention. The backward pass keeps the arguments, y and lse.

    Args:
      forward, backward: (queries, keys) a tile and a part of it; multiples of 128, the parts dividing the tile.
      interpret: as mosaic_tpu.call; None as the context says.

    Raises:
      NotImplementedError: float16, a bias, or heads too wide for VMEM.
    """
    mosaic_tpu.refuse_float16("attention", q, k, v)
    if bias is not None:
        raise NotImplementedError(
            "attention: the TPU kernels take no bias, which is as large as the scores that they never write; "
            "give segment_ids, keep, window or block_mask where it only masks"
        )
    dtype = jnp.result_type(q, k, v)
    (queries, heads, width), (keys, groups), value_width = q.shape[1:], k.shape[1:3], v.shape[-1]
    if block_mask is not None and len(block_mask) > 1 and groups < heads:  # every head has tiles of its own
        k, v = (x.repeat(heads // groups, 2) for x in (k, v))
        groups = heads
    plan = tiles_tpu.plan(
        (queries, keys, heads, groups, width, value_width),
        dtype,
        window=window,
        block_mask=block_mask,
        marked=keep is not None or q_segments is not None,
        scale=scale,
        activation=activation,
        forward=forward,
        backward=backward,
        interpret=mosaic_tpu.interpreted() if interpret is None else interpret,
        kind=dispatch.device_kind(),
    )
    y, lse = _padded(plan, q, k, v, keep, q_segments, k_segments)
    return y.astype(v.dtype), lse


@functools.partial(jax.jit, static_argnums=0)
def _padded(plan: Plan, q, k, v, keep, q_segments, k_segments):
    """Fills up widths with zeros, and cuts them off again. Lengths are filled up by each pass for its own tiles."""
    marks = _marks(plan, q, keep, q_segments, k_segments)
    width, value_width = q.shape[-1], v.shape[-1]
    q, k = (_fill(x.astype(plan.dtype), 3, plan.width // plan.pack - width) for x in (q, k))
    v = _fill(v.astype(plan.dtype), 3, plan.value_width // plan.pack - value_width)
    y, lse = _attend(plan, q, k, v, marks)
    return y[..., :value_width], None if lse is None else lse[:, :, 0].swapaxes(1, 2)


def _marks(plan: Plan, q, keep, q_segments, k_segments):
    """[B 1 T], [B 1 S]: a pair of tokens is visible where they are equal. The two lowest ids count as one."""
    if not plan.marked:
        return None
    if q_segments is None:
        q_segments, k_segments = jnp.zeros(q.shape[:2], jnp.int32), jnp.zeros(keep.shape, jnp.int32)
    q_segments, k_segments = (jnp.maximum(x.astype(jnp.int32), LOWEST + 1) for x in (q_segments, k_segments))
    if keep is not None:
        k_segments = jnp.where(keep, k_segments, LOWEST)
    return q_segments[:, None], k_segments[:, None]


def _fill(x, axis, count, value=0):
    if count == 0:
        return x
    return jnp.pad(x, [(0, count if n == axis else 0) for n in range(x.ndim)], constant_values=value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, v, marks):
    return _forward(plan, q, k, v, marks)[0]


def _flat(plan: Plan, sizes: Sizes, q, k, v, marks):
    """[B T H K] -> [B T H*K], which moves nothing, filled up to whole tiles."""
    more, most = -plan.queries % sizes.rows, -plan.keys % sizes.columns
    arrays = [_fill(x.reshape(*x.shape[:2], -1), 1, n) for x, n in ((q, more), (k, most), (v, most))]
    if marks is None:
        return *arrays, None, None
    return *arrays, _fill(marks[0], 2, more), _fill(marks[1], 2, most)


def _forward(plan: Plan, q, k, v, marks):
    flat, lse = forward(plan, *_flat(plan, plan.forward, q, k, v, marks), cost=_cost(plan, q, v, False))
    flat = flat[:, : plan.queries]
    lse = None if lse is None else lse[..., : plan.queries]  # in powers of two, as the backward pass wants it:
    natural = None if lse is None else lse / LOG2E  # turned over and back, its rounding would be an error in exponents
    return (flat.reshape(*q.shape[:3], v.shape[-1]), natural), (q, k, v, marks, flat, lse)


def _backward(plan: Plan, saved, cotangents):
    q, k, v, marks, y, lse = saved
    dy, dlse = cotangents
    arrays: Any = _flat(plan, plan.backward, q, k, v, marks)
    more = arrays[0].shape[1] - plan.queries
    dy = _fill(dy.reshape(y.shape), 1, more)
    delta = None
    if lse is not None:
        empty = lse == -jnp.inf
        reads = pl.CostEstimate(
            flops=2 * y.size, bytes_accessed=2 * y.size * y.dtype.itemsize + 4 * lse.size, transcendentals=0
        )
        delta = products(plan, _fill(y, 1, more), dy, cost=reads) - _fill(jnp.where(empty, 0.0, dlse), 3, more)
        lse = _fill(jnp.where(empty, jnp.inf, lse), 3, more, jnp.inf)
    cost = _cost(plan, q, v, True)
    flat_q, flat_k, flat_v, q_marks, k_marks = arrays
    dq, dk, dv = backward(plan, flat_q, flat_k, flat_v, dy, lse, delta, q_marks, k_marks, cost=cost)
    grads = (g[:, : x.shape[1]].reshape(x.shape) for g, x in ((dq, q), (dk, k), (dv, v)))
    return *grads, None if marks is None else jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), marks)


_attend.defvjp(_forward, _backward)


def _cost(plan: Plan, q, v, back):
    sizes = plan.backward if back else plan.forward
    visible = (classify(plan, sizes)[0] != NONE).sum() / plan.sets * sizes.rows * sizes.columns
    return costs.attention(
        *(q.shape[0], plan.heads, plan.groups, plan.queries, plan.keys, q.shape[-1], v.shape[-1]),
        scores=float(visible),
        itemsize=q.dtype.itemsize,
        backward=back,
        fused=not back or fused(plan),
    ).estimate()
