"""The backward GPU kernels: gradients of the queries tile by tile, then of the keys and values; scores made again."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import mosaic_gpu
from kernels_pallas.attention.pallas_gpu_forward import LOG2E, PIECE, STAGES, Plan, hide
from kernels_pallas.attention.pallas_gpu_table import TILE
from kernels_pallas.mosaic_gpu import across, by_column, by_row, down, product, tile, transposed


def backward_queries(plan: Plan, q, k, v, dy, lse, delta, ids, table, *, cost: pl.CostEstimate):
    """dq. lse (times log2 e, +inf for rows that see nothing) and delta = sum(dy y) - dlse are [B H T]."""
    (batch, length, heads, width), groups, values = q.shape, k.shape[2], v.shape[3]
    scratch = _scratch_queries(width, values, q.dtype, plan.masked)
    return mosaic_gpu.call(
        functools.partial(_queries, plan=plan, repeats=heads // groups, many=table[0].shape[0] > 1),
        name="attention_backward_queries",
        grid={"heads": heads, "tiles": length // TILE, "rows": batch},
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch=scratch,
        cost=cost,
        interpret=plan.interpret,
    )(q, k, v, dy, lse, delta, *table, *ids)


def backward_keys(plan: Plan, q, k, v, dy, lse, delta, ids, table, *, cost: pl.CostEstimate):
    """dk, dv, summed over the query heads of a key head; table: the queries that each tile of keys visits."""
    (batch, length, groups, width), heads, values = k.shape, q.shape[2], v.shape[3]
    return mosaic_gpu.call(
        functools.partial(_keys, plan=plan, repeats=heads // groups, many=table[0].shape[0] > 1),
        name="attention_backward_keys",
        grid={"heads": groups, "tiles": length // TILE, "rows": batch},
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch=_scratch_keys(width, values, q.dtype, plan.masked),
        cost=cost,
        interpret=plan.interpret,
    )(q, k, v, dy, lse, delta, *table, *ids)


def need(keys: int, values: int) -> int:
    """Bytes of shared memory."""
    return mosaic_gpu.nbytes(*_scratch_keys(keys, values, jnp.bfloat16, True).values())


def _scratch_queries(width, values, dtype, masked):
    return {
        "q_s": tile((TILE, width), dtype),
        "dy_s": tile((TILE, values), dtype),
        "rows_s": plgpu.SMEM((2, TILE), jnp.float32),
        "k_s": tile((STAGES, TILE, width), dtype),
        "v_s": tile((STAGES, TILE, values), dtype),
        "dscores_s": tile((TILE, TILE), dtype),
        **({"q_ids_s": plgpu.SMEM((TILE,), jnp.int32)} if masked else {}),
        **({"k_ids_s": plgpu.SMEM((STAGES, TILE), jnp.int32)} if masked else {}),
        "begun": plgpu.Barrier(num_arrivals=4 + masked),
        "arrived": plgpu.Barrier(num_arrivals=2 + masked, num_barriers=STAGES),
    }


def _scratch_keys(width, values, dtype, masked):
    return {
        "k_s": tile((TILE, width), dtype),
        "v_s": tile((TILE, values), dtype),
        "q_s": tile((STAGES, TILE, width), dtype),
        "dy_s": tile((STAGES, TILE, values), dtype),
        "rows_s": plgpu.SMEM((STAGES, 2, TILE), jnp.float32),
        "pairs_s": tile((TILE, TILE), dtype),
        "dscores_s": tile((TILE, TILE), dtype),
        **({"k_ids_s": plgpu.SMEM((TILE,), jnp.int32)} if masked else {}),
        **({"q_ids_s": plgpu.SMEM((STAGES, TILE), jnp.int32)} if masked else {}),
        "begun": plgpu.Barrier(num_arrivals=2 + masked),
        "arrived": plgpu.Barrier(num_arrivals=4 + masked, num_barriers=STAGES),
    }


def _queries(q_ref, k_ref, v_ref, dy_ref, lse_ref, delta_ref, counts_ref, visits_ref, *rest, plan, repeats, many, **s):
    *ids, dq_ref = rest
    b, h, m = (lax.axis_index(name) for name in ("rows", "heads", "tiles"))
    j = h if many else 0
    here, group, dtype = pl.ds(m * TILE, TILE), h // repeats, q_ref.dtype
    count = counts_ref[j, m]

    def fetch(i, slot):
        there, done = pl.ds(visits_ref[j, m, i] // 2 * TILE, TILE), s["arrived"].at[slot]
        plgpu.copy_gmem_to_smem(k_ref.at[b, there, group], s["k_s"].at[slot], done)
        plgpu.copy_gmem_to_smem(v_ref.at[b, there, group], s["v_s"].at[slot], done)
        if plan.masked:
            plgpu.copy_gmem_to_smem(ids[1].at[b, there], s["k_ids_s"].at[slot], done)

    plgpu.copy_gmem_to_smem(q_ref.at[b, here, h], s["q_s"], s["begun"])
    plgpu.copy_gmem_to_smem(dy_ref.at[b, here, h], s["dy_s"], s["begun"])
    plgpu.copy_gmem_to_smem(lse_ref.at[b, h, here], s["rows_s"].at[0], s["begun"])
    plgpu.copy_gmem_to_smem(delta_ref.at[b, h, here], s["rows_s"].at[1], s["begun"])
    if plan.masked:
        plgpu.copy_gmem_to_smem(ids[0].at[b, here], s["q_ids_s"], s["begun"])
    for i in range(STAGES):
        pl.when(i < count)(functools.partial(fetch, i, i))
    plgpu.barrier_wait(s["begun"])
    pieces = [pl.ds(n, PIECE) for n in range(0, s["q_s"].shape[1], PIECE)]
    shape = (TILE, TILE)

    def step(i, sums):
        slot = lax.rem(i, STAGES)
        plgpu.barrier_wait(s["arrived"].at[slot])
        visit = visits_ref[j, m, i]
        scores = product(shape, (s["q_s"], transposed(s["k_s"].at[slot]))) * (plan.scale * LOG2E)
        q_ids = by_row(s["q_ids_s"]) if plan.masked else None
        k_ids = by_column(s["k_ids_s"].at[slot]) if plan.masked else None
        scores = hide(plan, scores, m, visit // 2, visit % 2, q_ids, k_ids, 0)
        weights = jnp.exp2(scores - across(by_row(s["rows_s"].at[0]), shape))
        dweights = product(shape, (s["dy_s"], transposed(s["v_s"].at[slot])))
        dscores = weights * (dweights - across(by_row(s["rows_s"].at[1]), shape)) * plan.scale
        s["dscores_s"][...] = dscores.astype(dtype)
        plgpu.commit_smem()
        sums = [x + product(x.shape, (s["dscores_s"], s["k_s"].at[slot, :, p])) for x, p in zip(sums, pieces)]

        @pl.when(i + STAGES < count)
        def _():
            fetch(i + STAGES, slot)

        return sums

    sums = lax.fori_loop(0, count, step, [mosaic_gpu.zeros((TILE, PIECE)) for _ in pieces])
    for piece, dq in zip(pieces, sums):
        s["q_s"][:, piece] = dq.astype(dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(s["q_s"], dq_ref.at[b, here, h])
    plgpu.wait_smem_to_gmem(0)


def _keys(q_ref, k_ref, v_ref, dy_ref, lse_ref, delta_ref, counts_ref, visits_ref, *rest, plan, repeats, many, **s):
    """Scores are transposed here, keys in rows."""
    *ids, dk_ref, dv_ref = rest
    b, g, n = (lax.axis_index(name) for name in ("rows", "heads", "tiles"))
    here, dtype = pl.ds(n * TILE, TILE), q_ref.dtype
    j = g if many else 0  # a mask for every head comes with as many key heads
    visits = counts_ref[j, n]
    count = visits * repeats

    def fetch(i, slot):
        there, done = pl.ds(visits_ref[j, n, i % visits] // 2 * TILE, TILE), s["arrived"].at[slot]
        h = g * repeats + i // visits
        plgpu.copy_gmem_to_smem(q_ref.at[b, there, h], s["q_s"].at[slot], done)
        plgpu.copy_gmem_to_smem(dy_ref.at[b, there, h], s["dy_s"].at[slot], done)
        plgpu.copy_gmem_to_smem(lse_ref.at[b, h, there], s["rows_s"].at[slot, 0], done)
        plgpu.copy_gmem_to_smem(delta_ref.at[b, h, there], s["rows_s"].at[slot, 1], done)
        if plan.masked:
            plgpu.copy_gmem_to_smem(ids[0].at[b, there], s["q_ids_s"].at[slot], done)

    plgpu.copy_gmem_to_smem(k_ref.at[b, here, g], s["k_s"], s["begun"])
    plgpu.copy_gmem_to_smem(v_ref.at[b, here, g], s["v_s"], s["begun"])
    if plan.masked:
        plgpu.copy_gmem_to_smem(ids[1].at[b, here], s["k_ids_s"], s["begun"])
    for i in range(STAGES):
        pl.when(i < count)(functools.partial(fetch, i, i))
    plgpu.barrier_wait(s["begun"])
    keys = [pl.ds(n, PIECE) for n in range(0, s["k_s"].shape[1], PIECE)]
    values = [pl.ds(n, PIECE) for n in range(0, s["v_s"].shape[1], PIECE)]
    shape = (TILE, TILE)

    def step(i, carry):
        dks, dvs = carry
        slot = lax.rem(i, STAGES)
        plgpu.barrier_wait(s["arrived"].at[slot])
        visit = visits_ref[j, n, i % visits]
        scores = product(shape, (s["k_s"], transposed(s["q_s"].at[slot]))) * (plan.scale * LOG2E)
        q_ids = by_column(s["q_ids_s"].at[slot]) if plan.masked else None
        k_ids = by_row(s["k_ids_s"]) if plan.masked else None
        scores = hide(plan, scores, visit // 2, n, visit % 2, q_ids, k_ids, 1)
        weights = jnp.exp2(scores - down(by_column(s["rows_s"].at[slot, 0]), shape))
        dweights = product(shape, (s["v_s"], transposed(s["dy_s"].at[slot])))
        dscores = weights * (dweights - down(by_column(s["rows_s"].at[slot, 1]), shape)) * plan.scale
        s["pairs_s"][...], s["dscores_s"][...] = weights.astype(dtype), dscores.astype(dtype)
        plgpu.commit_smem()
        dks = [x + product(x.shape, (s["dscores_s"], s["q_s"].at[slot, :, p])) for x, p in zip(dks, keys)]
        dvs = [x + product(x.shape, (s["pairs_s"], s["dy_s"].at[slot, :, p])) for x, p in zip(dvs, values)]

        @pl.when(i + STAGES < count)
        def _():
            fetch(i + STAGES, slot)

        return dks, dvs

    start = [[mosaic_gpu.zeros((TILE, PIECE)) for _ in pieces] for pieces in (keys, values)]
    dks, dvs = lax.fori_loop(0, count, step, tuple(start))
    for shared, pieces, sums in (("k_s", keys, dks), ("v_s", values, dvs)):
        for piece, x in zip(pieces, sums):
            s[shared][:, piece] = x.astype(dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(s["k_s"], dk_ref.at[b, here, g])
    plgpu.copy_smem_to_gmem(s["v_s"], dv_ref.at[b, here, g])
    plgpu.wait_smem_to_gmem(0)
