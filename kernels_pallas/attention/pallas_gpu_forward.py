"""The forward GPU kernel: a tile of queries against the tiles of keys it sees, with a running softmax."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import mosaic_gpu
from kernels_pallas.attention.pallas_gpu_table import TILE
from kernels_pallas.mosaic_gpu import across, by_column, by_row, down, product, tile, transposed

LOG2E = math.log2(math.e)
LOWEST = -1e30  # below any score, and finite, so that a row that sees nothing has exp(-inf - LOWEST) = 0
STAGES = 2  # tiles of keys in shared memory: one is read while the next arrives
PIECE = 64  # columns of the values a product: its result takes 32 registers a thread beside the running sums


class Plan(NamedTuple):
    """What the kernels are built from, all static."""

    queries: int  # T, before filling up to whole tiles
    keys: int  # S
    window: tuple[int | None, int | None]
    scale: float
    masked: bool  # there are ids of segments, or padding
    interpret: mosaic_gpu.Interpret


def forward(plan: Plan, q, k, v, ids, table, *, cost: pl.CostEstimate):
    """y [B T H V] and lse * log2 e [B H T] of q [B T H K], k [B S G K], v [B S G V], all lengths whole tiles.

    ids: ([B T], [B S]) int32, equal where a query may see a key, or (); table: (counts, visits) of the queries.
    """
    (batch, length, heads, width), groups, values = q.shape, k.shape[2], v.shape[3]
    many = table[0].shape[0] > 1
    scratch = {
        "q_s": tile((TILE, width), q.dtype),
        "k_s": tile((STAGES, TILE, width), q.dtype),
        "v_s": tile((STAGES, TILE, values), q.dtype),
        "pairs_s": tile((TILE, TILE), q.dtype),
        "y_s": tile((TILE, values), q.dtype),
        "lse_s": plgpu.SMEM((TILE,), jnp.float32),
        **({"q_ids_s": plgpu.SMEM((TILE,), jnp.int32)} if plan.masked else {}),
        **({"k_ids_s": plgpu.SMEM((STAGES, TILE), jnp.int32)} if plan.masked else {}),
        "begun": plgpu.Barrier(num_arrivals=1 + plan.masked),
        "arrived": plgpu.Barrier(num_arrivals=2 + plan.masked, num_barriers=STAGES),
    }
    return mosaic_gpu.call(
        functools.partial(_kernel, plan=plan, repeats=heads // groups, many=many),
        name="attention_forward",
        grid={"heads": heads, "tiles": length // TILE, "rows": batch},
        out_type=(
            jax.ShapeDtypeStruct((batch, length, heads, values), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        scratch=scratch,
        cost=cost,
        interpret=plan.interpret,
    )(q, k, v, *table, *ids)


def _kernel(q_ref, k_ref, v_ref, counts_ref, visits_ref, *rest, plan: Plan, repeats: int, many: bool, **s):
    *ids, y_ref, lse_ref = rest
    b, h, m = (lax.axis_index(name) for name in ("rows", "heads", "tiles"))
    j = h if many else 0
    here, group, dtype = pl.ds(m * TILE, TILE), h // repeats, q_ref.dtype
    count = counts_ref[j, m]

    def fetch(i, slot):
        n = visits_ref[j, m, i] // 2
        there, done = pl.ds(n * TILE, TILE), s["arrived"].at[slot]
        plgpu.copy_gmem_to_smem(k_ref.at[b, there, group], s["k_s"].at[slot], done)
        plgpu.copy_gmem_to_smem(v_ref.at[b, there, group], s["v_s"].at[slot], done)
        if plan.masked:
            plgpu.copy_gmem_to_smem(ids[1].at[b, there], s["k_ids_s"].at[slot], done)

    plgpu.copy_gmem_to_smem(q_ref.at[b, here, h], s["q_s"], s["begun"])
    if plan.masked:
        plgpu.copy_gmem_to_smem(ids[0].at[b, here], s["q_ids_s"], s["begun"])
    for i in range(STAGES):
        pl.when(i < count)(functools.partial(fetch, i, i))
    plgpu.barrier_wait(s["begun"])
    pieces = [pl.ds(n, PIECE) for n in range(0, s["y_s"].shape[1], PIECE)]
    shape = (TILE, PIECE)

    def step(i, carry):
        high, total, *sums = carry
        slot = lax.rem(i, STAGES)
        plgpu.barrier_wait(s["arrived"].at[slot])
        scores = product((TILE, TILE), (s["q_s"], transposed(s["k_s"].at[slot]))) * (plan.scale * LOG2E)
        visit = visits_ref[j, m, i]
        q_ids = by_row(s["q_ids_s"]) if plan.masked else None
        k_ids = by_column(s["k_ids_s"].at[slot]) if plan.masked else None
        scores = hide(plan, scores, m, visit // 2, visit % 2, q_ids, k_ids, 0)
        new = jnp.maximum(high, scores.max(1))
        scale = jnp.exp2(high - new)
        weights = jnp.exp2(scores - across(new, scores.shape))
        s["pairs_s"][...] = weights.astype(dtype)
        plgpu.commit_smem()
        added = [product(shape, (s["pairs_s"], s["v_s"].at[slot, :, piece])) for piece in pieces]
        sums = [x * across(scale, shape) + more for x, more in zip(sums, added)]

        @pl.when(i + STAGES < count)
        def _():
            fetch(i + STAGES, slot)

        return new, total * scale + weights.sum(1), *sums

    row = lambda value: plgpu.layout_cast(  # noqa: E731
        jnp.full((TILE,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1)
    )
    start = (row(LOWEST), row(0.0), *(mosaic_gpu.zeros(shape) for _ in pieces))
    high, total, *sums = lax.fori_loop(0, count, step, start)
    some = jnp.where(total == 0.0, 1.0, total)
    for piece, y in zip(pieces, sums):
        s["y_s"][:, piece] = (y / across(some, shape)).astype(dtype)
    s["lse_s"][...] = jnp.where(total == 0.0, -jnp.inf, high + jnp.log(some) * LOG2E)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(s["y_s"], y_ref.at[b, here, h])
    plgpu.copy_smem_to_gmem(s["lse_s"], lse_ref.at[b, h, here])
    plgpu.wait_smem_to_gmem(0)


def hide(plan: Plan, scores, m, n, partly, q_ids, k_ids, axis):
    """-inf where a query of tile m may not see a key of tile n; queries along `axis`. partly: 1 where needed."""
    offset = mosaic_gpu.numbers(scores.shape, 1 - axis) - mosaic_gpu.numbers(scores.shape, axis)
    key = mosaic_gpu.numbers(scores.shape, 1 - axis) + n * TILE
    offset = offset + (n - m) * TILE - (plan.keys - plan.queries)  # s - the position of t
    left, right = plan.window
    visible = key < plan.keys
    if left is not None:
        visible = visible & (offset >= -left)
    if right is not None:
        visible = visible & (offset <= right)
    if plan.masked:
        q_wide, k_wide = (across, down) if axis == 0 else (down, across)
        visible = visible & (q_wide(q_ids, scores.shape) == k_wide(k_ids, scores.shape))
    return jnp.where(visible | (partly == 0), scores, -jnp.inf)
