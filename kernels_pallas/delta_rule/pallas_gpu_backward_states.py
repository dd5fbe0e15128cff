"""The backward GPU kernel of the states: chunks from the last to the first, the state's gradient in registers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import mosaic_gpu
from kernels_pallas.delta_rule.pallas_gpu_forward import STAGES, Plan
from kernels_pallas.gpu_decay import CHUNK, SINCE, UNTIL, between
from kernels_pallas.mosaic_gpu import across, by_row, load, product, tile, transposed


def backward_states(plan: Plan, q, k, inverse, dy, beta, rows, dlast, *, cost: pl.CostEstimate):
    """dX = R^T dU [B T H V], the gradients of the states after each chunk [B N H K V], that of the first state.

    q, k [B T H K], inverse (R) [B T H C], dy [B T H V], beta [B N H C] float32, dlast [B H K V] float32; rows
    [B N H 4 C] of gpu_decay, or None.
    """
    (batch, length, heads, width), n = q.shape, plan.columns
    chunks, dtype = length // CHUNK, q.dtype
    stages = min(STAGES, chunks)
    out = (
        jax.ShapeDtypeStruct(dy.shape, dtype),
        jax.ShapeDtypeStruct((batch, chunks, *dlast.shape[1:]), dtype),
        jax.ShapeDtypeStruct(dlast.shape, jnp.float32),
    )
    return mosaic_gpu.call(
        functools.partial(_kernel, plan=plan, chunks=chunks),
        name="delta_rule_backward_states",
        grid={"columns": dy.shape[-1] // n, "heads": heads, "rows": batch},
        out_type=out,
        scratch=_scratch(stages, width, n, dtype, plan.decay),
        cost=cost,
        interpret=plan.interpret,
    )(*(q, k, inverse, dy, beta), *([rows] if plan.decay else []), dlast)


def need(width: int, columns: int) -> int:
    """Bytes of shared memory."""
    return mosaic_gpu.nbytes(*_scratch(STAGES, width, columns, jnp.bfloat16, True).values())


def _scratch(stages, width, n, dtype, decay):
    return {
        **{name: tile((stages, CHUNK, width), dtype) for name in ("q_s", "k_s")},
        "inverse_s": tile((stages, CHUNK, CHUNK), dtype),
        "dy_s": tile((stages, CHUNK, n), dtype),
        "beta_s": plgpu.SMEM((stages, CHUNK), jnp.float32),
        **({"rows_s": plgpu.SMEM((stages, 4, CHUNK), jnp.float32)} if decay else {}),
        "pairs_s": tile((CHUNK, CHUNK), dtype),
        **{name: tile((CHUNK, n), dtype) for name in ("dupdates_s", "dscaled_s", "by_keys_s")},
        **({"by_queries_s": tile((CHUNK, n), dtype)} if decay else {}),
        "low_s": tile((width, n), dtype),
        "dstate_s": tile((width, n), jnp.float32),
        "arrived": plgpu.Barrier(num_arrivals=5 + decay, num_barriers=stages),
        "begun": plgpu.Barrier(),
    }


def _kernel(q_ref, k_ref, inverse_ref, dy_ref, beta_ref, *rest, plan: Plan, chunks: int, **s):
    rows_ref, (dlast_ref, dscaled_ref, dstates_ref, dfirst_ref) = rest[: int(plan.decay)], rest[int(plan.decay) :]
    b, h = lax.axis_index("rows"), lax.axis_index("heads")
    columns = pl.ds(lax.axis_index("columns") * plan.columns, plan.columns)
    stages, dtype = s["k_s"].shape[0], q_ref.dtype
    state_shape, shape = s["low_s"].shape, s["dscaled_s"].shape

    def fetch(i, slot):
        """Starts the copies of the i-th chunk from behind."""
        n, done = chunks - 1 - i, s["arrived"].at[slot]
        here = pl.ds(n * CHUNK, CHUNK)
        for ref, name in ((q_ref, "q_s"), (k_ref, "k_s"), (inverse_ref, "inverse_s")):
            plgpu.copy_gmem_to_smem(ref.at[b, here, h], s[name].at[slot], done)
        plgpu.copy_gmem_to_smem(dy_ref.at[b, here, h, columns], s["dy_s"].at[slot], done)
        plgpu.copy_gmem_to_smem(beta_ref.at[b, n, h], s["beta_s"].at[slot], done)
        if plan.decay:
            plgpu.copy_gmem_to_smem(rows_ref[0].at[b, n, h], s["rows_s"].at[slot], done)

    plgpu.copy_gmem_to_smem(dlast_ref.at[b, h, :, columns], s["dstate_s"], s["begun"])
    for i in range(stages):
        fetch(i, i)
    plgpu.barrier_wait(s["begun"])

    def step(i, dstate):
        n, slot = chunks - 1 - i, lax.rem(i, stages)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last chunk's outputs have left
        s["low_s"][...] = dstate.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(s["low_s"], dstates_ref.at[b, n, h, :, columns])
        plgpu.barrier_wait(s["arrived"].at[slot])
        q_s, k_s, dy_s = s["q_s"].at[slot], s["k_s"].at[slot], s["dy_s"].at[slot]
        rows_s: Any = s["rows_s"].at[slot] if plan.decay else None
        pairs = product((CHUNK, CHUNK), (q_s, transposed(k_s))) * between(rows_s)
        s["pairs_s"][...] = pairs.astype(dtype)
        plgpu.commit_smem()
        if plan.decay:  # dU = (G o Q K^T)^T dY + K~ dS'
            dupdates = product(shape, (k_s, s["low_s"])) * across(by_row(rows_s.at[UNTIL]), shape)
            dupdates += product(shape, (transposed(s["pairs_s"]), dy_s))
        else:
            dupdates = product(shape, (k_s, s["low_s"]), (transposed(s["pairs_s"]), dy_s))
        s["dupdates_s"][...] = dupdates.astype(dtype)
        plgpu.commit_smem()
        dscaled = product(shape, (transposed(s["inverse_s"].at[slot]), s["dupdates_s"]))
        s["dscaled_s"][...] = dscaled.astype(dtype)
        by_keys = dscaled * across(by_row(s["beta_s"].at[slot]), shape)
        total: Any = None
        by_queries_s: Any = dy_s
        if plan.decay:
            total, since = rows_s[SINCE, CHUNK - 1], across(by_row(rows_s.at[SINCE]), shape)
            by_keys, by_queries_s = by_keys * since, s["by_queries_s"]
            by_queries_s[...] = (load(dy_s).astype(jnp.float32) * since).astype(dtype)
        s["by_keys_s"][...] = (-by_keys).astype(dtype)
        plgpu.commit_smem()  # after the last read of this chunk's arrays: the next ones overwrite them
        plgpu.copy_smem_to_gmem(s["dscaled_s"], dscaled_ref.at[b, pl.ds(n * CHUNK, CHUNK), h, columns])
        read = product(state_shape, (transposed(k_s), s["by_keys_s"]), (transposed(q_s), by_queries_s))
        dstate = (dstate * total if plan.decay else dstate) + read

        @pl.when(i + stages < chunks)
        def _():
            fetch(i + stages, slot)

        return dstate

    dstate = lax.fori_loop(0, chunks, step, load(s["dstate_s"]))
    s["dstate_s"][...] = dstate
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(s["dstate_s"], dfirst_ref.at[b, h, :, columns])
    plgpu.wait_smem_to_gmem(0)
