"""Attention on GPU (Pallas Mosaic GPU, Hopper): padding, tables of tiles and the gradient rule.

Checked by interpretation and by lowering to a CUDA module only: no figure of speed is known yet.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import costs, dispatch, mosaic_gpu
from kernels_pallas.attention.pallas_gpu_backward import backward_keys, backward_queries, need
from kernels_pallas.attention.pallas_gpu_forward import LOG2E, Plan, forward
from kernels_pallas.attention.pallas_gpu_table import TILE, tables


def attention_gpu(
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
    interpret: mosaic_gpu.Interpret | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"] | None]:
    """y, lse of api.attention. The backward pass keeps the arguments, y and lse.

    A block of the GPU runs 64 queries of one head against the tiles of 64 keys that any of them may see.

    Args:
      interpret: as mosaic_gpu.call; None as the context says.

    Raises:
      NotImplementedError: a bias, the sigmoid, blocks that are not made of tiles, a block mask of every head's own for
        grouped heads, heads wider than 128, other dtypes than bfloat16 and float16, or devices other than Hopper.
    """
    mosaic_gpu.refuse("attention", dispatch.device_kind(), q, k, v)
    if bias is not None or activation != "softmax":
        raise NotImplementedError("attention: the GPU kernels take no bias and only the softmax; use 'chunked'")
    widths = [-(-x.shape[-1] // 64) * 64 for x in (q, v)]
    if max(widths) > 128:
        raise NotImplementedError(
            f"attention: heads of {q.shape[-1]} and {v.shape[-1]} are wider than 128: the gradients of a tile of keys "
            "would not fit into registers; use 'cudnn' or 'chunked'"
        )
    mosaic_gpu.refuse_bytes("attention_backward_keys", need(*widths))
    if block_mask is not None and len(block_mask) > 1 and q.shape[2] != k.shape[2]:
        raise NotImplementedError("attention: a block mask for every head needs as many key heads; repeat k and v")
    masked = keep is not None or q_segments is not None
    by_queries, by_keys = tables(q.shape[1], k.shape[1], window, block_mask, masked)
    mode = mosaic_gpu.interpreted() if interpret is None else mosaic_gpu.parameters(interpret)
    plan = Plan(q.shape[1], k.shape[1], window, scale, masked, mode)
    ids = _ids(q, k, keep, q_segments, k_segments) if masked else ()
    return _padded(plan, q, k, v, ids, tuple(map(jnp.asarray, by_queries)), tuple(map(jnp.asarray, by_keys)))


def _ids(q, k, keep, q_segments, k_segments):
    """Ids of queries and keys that are equal where a key may be seen; padding keys get one that no query has."""
    if q_segments is None:
        q_segments, k_segments = jnp.zeros(q.shape[:2], jnp.int32), jnp.zeros(k.shape[:2], jnp.int32)
    q_segments, k_segments = q_segments.astype(jnp.int32), k_segments.astype(jnp.int32)
    if keep is not None:
        k_segments = jnp.where(keep, k_segments, jnp.iinfo(jnp.int32).min)
    return q_segments, k_segments


@functools.partial(jax.jit, static_argnums=0)
def _padded(plan: Plan, q, k, v, ids, by_queries, by_keys):
    rows, columns = -plan.queries % TILE, -plan.keys % TILE
    width, deep = q.shape[-1], v.shape[-1]
    q = _fill(q, 0, rows, 0, -width % 64)
    k, v = _fill(k, 0, columns, 0, -width % 64), _fill(v, 0, columns, 0, -deep % 64)
    ids = tuple(_fill(x, 0, more) for x, more in zip(ids, (rows, columns)))
    y, lse = _attend(plan, q, k, v, ids, by_queries, by_keys)
    return y[:, : plan.queries, :, :deep], lse[:, :, : plan.queries].swapaxes(1, 2)


def _fill(x, *ends):
    return jnp.pad(x, [(0, end) for end in ends]) if any(ends) else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, v, ids, by_queries, by_keys):
    return _forward(plan, q, k, v, ids, by_queries)


def _forward(plan: Plan, q, k, v, ids, table):
    def run(q, k, v, *ids):
        y, lse = forward(plan, q, k, v, ids, table, cost=_cost(plan, q, v, table, False))
        return y, lse / LOG2E

    return mosaic_gpu.over_rows(run)(q, k, v, *ids)


def _save(plan: Plan, q, k, v, ids, by_queries, by_keys):
    y, lse = _forward(plan, q, k, v, ids, by_queries)
    return (y, lse), (q, k, v, y, lse, ids, by_queries, by_keys)


def _backward(plan: Plan, saved, cotangents):
    q, k, v, y, lse, ids, by_queries, by_keys = saved
    dy, dlse = cotangents

    def run(q, k, v, y, lse, dy, dlse, *ids):
        delta = jnp.einsum("bthv,bthv->bht", dy.astype(jnp.float32), y.astype(jnp.float32)) - dlse
        lse = jnp.where(jnp.isfinite(lse), lse * LOG2E, jnp.inf)  # a row that sees nothing has no weights
        delta = jnp.where(jnp.isfinite(lse), delta, 0.0)
        args = (plan, q, k, v, dy, lse, delta, ids)
        cost = _cost(plan, q, v, by_queries, True)
        return backward_queries(*args, by_queries, cost=cost), *backward_keys(*args, by_keys, cost=cost)

    dq, dk, dv = mosaic_gpu.over_rows(run)(q, k, v, y, lse, dy, dlse, *ids)
    return dq, dk, dv, *jax.tree.map(lambda _: None, ((None,) * len(ids), (None, None), (None, None)))


_attend.defvjp(_save, _backward)


def _cost(plan: Plan, q, v, table, backward: bool):
    """Of the forward kernel, or of each of the two backward kernels."""
    batch, _, heads, width = q.shape
    scores = float(table[1].shape[1] * table[1].shape[2] * TILE**2)
    sizes = (batch, heads, v.shape[2], plan.queries, plan.keys, width, v.shape[3])
    cost = costs.attention(*sizes, scores=scores, itemsize=q.dtype.itemsize, backward=backward, fused=False)
    return cost.estimate(2 if backward else 1)
