"""Attention of one new token on TPU (Pallas Mosaic TPU): the keys and values are read once; README.md."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas import costs, dispatch, mosaic_tpu
from kernels_pallas.decode_attention import tiles
from kernels_pallas.decode_attention.chunked import decode_attention_chunked, merge

LANES = 128


class Plan(NamedTuple):
    """What a kernel is compiled for."""

    groups: int  # G
    width: int  # K
    deep: int  # V
    keys: int  # S
    chunk: int  # keys a grid step
    splits: int  # parts of the cache
    steps: int  # grid steps a part
    window: int | None
    scale: float
    vmem: int | None
    interpret: Any


def decode_attention_tpu(
    q: Float[Array, "B H K"],
    k_cache: Float[Array, "B S G K"],
    v_cache: Float[Array, "B S G V"],
    lengths: Int[Array, " B"],
    *,
    window: int | None,
    scale: float,
    chunk: int | None = None,
    splits: int | None = None,
    interpret: mosaic_tpu.Interpret | None = None,
) -> tuple[Float[Array, "B H V"]]:
    """(y,) of api.decode_attention in the dtype of v_cache. Its gradient is that of `chunked`.

    Args:
      chunk: keys a grid step, a multiple of 16 unless all. splits: parts of the cache, for devices of several cores.
      interpret: as mosaic_tpu.call; None as the context says.

    Raises:
      NotImplementedError: float16, or keys and values too wide for VMEM.
    """
    mosaic_tpu.refuse_float16("decode_attention", q, k_cache, v_cache)
    batch, keys, groups, width = k_cache.shape
    deep = v_cache.shape[-1]
    size = max(k_cache.dtype.itemsize, v_cache.dtype.itemsize)
    lanes = [-(-n // LANES) * LANES for n in (width, deep)]  # what a row takes in VMEM
    chunk = min(keys, chunk or tiles.keys_per_step(keys, groups * max(lanes) * size))
    steps = -(-keys // chunk)
    if window is not None:
        steps = min(steps, -(-(window - 1) // chunk) + 1)  # the most tiles that a window can lie in
    splits = splits or tiles.splits(batch, steps, dispatch.device_kind())
    columns = chunk * groups
    tile = 2 * columns * sum(lanes) * size + 6 * -(-q.shape[1] // 8) * 8 * columns * 4  # two of each, and scores
    plan = Plan(
        groups=groups,
        width=width,
        deep=deep,
        keys=keys,
        chunk=chunk,
        splits=splits,
        steps=-(-steps // splits),
        window=window,
        scale=scale,
        vmem=None if tile < mosaic_tpu.VMEM // 2 else min(mosaic_tpu.MOST, 4 * tile),
        interpret=mosaic_tpu.interpreted() if interpret is None else interpret,
    )
    return (_arranged(plan, q, k_cache, v_cache, lengths),)


@functools.partial(jax.jit, static_argnums=0)
def _arranged(plan: Plan, q, k_cache, v_cache, lengths):
    return _attend(plan, q, k_cache, v_cache, lengths.astype(jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k_cache, v_cache, lengths):
    heads = q.shape[1]
    rows = -(-heads // 8) * 8  # whole sublanes
    dtype = jnp.result_type(k_cache, v_cache)
    q = jnp.pad(q.astype(dtype), [(0, 0), (0, rows - heads), (0, 0)])
    y, lse = _parts(plan, q, _own(plan, heads, rows), k_cache, v_cache, lengths)
    y, lse = y[:, :, :heads], lse[:, :, :heads, 0]
    y = y[:, 0] if plan.splits == 1 else merge(y, lse)
    return y.astype(v_cache.dtype)


def _own(plan: Plan, heads, rows):
    """[H C*G] float32: 0 where a column, key and key head, is of the row's own key head; else -inf."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (rows, plan.chunk * plan.groups), n) for n in (0, 1))
    own = jnp.minimum(row, heads - 1) // (heads // plan.groups) == column % plan.groups
    return jnp.where(own, 0.0, -jnp.inf)


def _parts(plan: Plan, q, own, k_cache, v_cache, lengths):
    """y [B P H V] float32 of every part, and its log-sum-exp in all lanes of [B P H 128]."""
    batch, keys, groups, _ = k_cache.shape
    rows, columns = own.shape

    def place(b, p, t, lengths_ref):
        first, last = _bounds(plan, lengths_ref[b])
        return b, jnp.clip(first + p * plan.steps + t, 0, jnp.maximum(last, 0)), 0

    def part(size):
        return pl.BlockSpec((1, 1, rows, size), lambda b, p, t, lengths_ref: (b, p, 0, 0))

    cost = costs.decode_attention(batch, rows, groups, keys, plan.width, plan.deep, itemsize=k_cache.dtype.itemsize)
    return mosaic_tpu.call(
        functools.partial(_kernel, plan=plan),
        name="decode_attention_forward",
        grid=(batch, plan.splits, plan.steps),
        in_specs=[
            pl.BlockSpec((1, rows, plan.width), lambda b, p, t, lengths_ref: (b, 0, 0)),
            pl.BlockSpec((rows, columns), lambda b, p, t, lengths_ref: (0, 0)),
            pl.BlockSpec((1, columns, plan.width), place),
            pl.BlockSpec((1, columns, plan.deep), place),
        ],
        out_specs=[part(plan.deep), part(LANES)],
        out_shape=[jax.ShapeDtypeStruct((batch, plan.splits, rows, n), jnp.float32) for n in (plan.deep, LANES)],
        scratch_shapes=[pltpu.VMEM((rows, n), jnp.float32) for n in (LANES, LANES, plan.deep)],
        semantics=("parallel", "parallel", "arbitrary"),
        cost=cost.estimate(),
        scalar_prefetch=1,
        vmem=plan.vmem,
        working=3 * rows * columns * 4,
        interpret=plan.interpret,
        dtypes=[q.dtype, jnp.float32, k_cache.dtype, v_cache.dtype],
    )(lengths, q, own, k_cache.reshape(batch, keys * groups, -1), v_cache.reshape(batch, keys * groups, -1))


def _bounds(plan: Plan, length):
    """The first and the last tile of a row that are seen; the last is -1 if there is none."""
    first = 0 if plan.window is None else jax.lax.div(jnp.maximum(length - plan.window, 0), plan.chunk)
    return first, jax.lax.div(length + (plan.chunk - 1), plan.chunk) - 1


def _kernel(lengths_ref, q_ref, own_ref, k_ref, v_ref, y_ref, lse_ref, largest_ref, total_ref, sum_ref, *, plan: Plan):
    length = lengths_ref[pl.program_id(0)]
    turn = pl.program_id(2)
    first, last = _bounds(plan, length)
    tile = first + pl.program_id(1) * plan.steps + turn
    start = tile * plan.chunk
    oldest = 0 if plan.window is None else length - plan.window

    @pl.when(turn == 0)
    def _():
        largest_ref[...] = jnp.full(largest_ref.shape, -jnp.inf, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    def add(whole):
        k, v = k_ref[0].astype(q_ref.dtype), v_ref[0].astype(q_ref.dtype)  # [C*G K], [C*G V]
        scores = _dot(q_ref[0], k, 1) * plan.scale
        if plan.groups > 1:
            scores = scores + own_ref[...]
        if not whole:
            column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            seen = (column < (length - start) * plan.groups) & (column >= (oldest - start) * plan.groups)
            scores = jnp.where(seen, scores, -jnp.inf)
            row = jax.lax.broadcasted_iota(jnp.int32, v.shape, 0)
            v = jnp.where(row < (plan.keys - start) * plan.groups, v, jnp.zeros_like(v))  # past the end, anything
        before = largest_ref[...]  # [H 128], the same in all lanes
        largest = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - largest[:, :1])
        keep = jnp.exp(before - largest)
        total_ref[...] = keep * total_ref[...] + jnp.sum(weights, axis=1, keepdims=True)
        largest_ref[...] = largest
        sum_ref[...] = keep[:, :1] * sum_ref[...] + _dot(weights.astype(v.dtype), v, 0)

    whole = (start >= oldest) & (start + plan.chunk <= length)
    pl.when(whole & (tile <= last))(functools.partial(add, True))
    pl.when(jnp.logical_not(whole) & (tile <= last))(functools.partial(add, False))

    @pl.when(turn == plan.steps - 1)
    def _():
        total = total_ref[...]
        some = total > 0.0
        y_ref[0, 0] = sum_ref[...] / jnp.where(some, total, 1.0)[:, :1]
        lse_ref[0, 0] = jnp.where(some, largest_ref[...] + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)


def _dot(a, b, axis):
    """a b^T (axis 1) or a b (axis 0), summed in float32."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    form = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, form, precision=exact, preferred_element_type=jnp.float32)


def _save(plan: Plan, q, k_cache, v_cache, lengths):
    return _attend(plan, q, k_cache, v_cache, lengths), (q, k_cache, v_cache, lengths)


def _backward(plan: Plan, saved, dy):
    *arrays, lengths = saved

    def form(q, k_cache, v_cache):
        return decode_attention_chunked(q, k_cache, v_cache, lengths, window=plan.window, scale=plan.scale)[0]

    return *jax.vjp(form, *arrays)[1](dy), None


_attend.defvjp(_save, _backward)
