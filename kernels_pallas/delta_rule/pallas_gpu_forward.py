"""The forward GPU kernel: chunks in order, the state in registers, given each chunk's writes in terms of it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import mosaic_gpu
from kernels_pallas.gpu_decay import CHUNK, SINCE, UNTIL, between
from kernels_pallas.mosaic_gpu import across, by_row, load, product, tile, transposed

STAGES = 2  # chunks of inputs in shared memory: one is read while the next arrives


class Plan(NamedTuple):
    """What the kernel is built from, all static."""

    columns: int  # of the values, a block
    decay: bool
    interpret: mosaic_gpu.Interpret


def forward(plan: Plan, q, k, erase, values, rows, state, *, save: bool, cost: pl.CostEstimate):
    """y in the dtype of values, the last state, and with `save` the updates U [B T H V] and the states before each
    chunk [B N H K V], which the backward pass multiplies as the forward pass did.

    q, k, erase [B T H K], values [B T H V], state [B H K V] float32; rows [B N H 4 C] of gpu_decay, or None.
    """
    (batch, length, heads, width), n = q.shape, plan.columns
    chunks, dtype = length // CHUNK, values.dtype
    stages = min(STAGES, chunks)
    out = [jax.ShapeDtypeStruct(values.shape, dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32)]
    if save:
        out.append(jax.ShapeDtypeStruct(values.shape, dtype))
        out.append(jax.ShapeDtypeStruct((batch, chunks, *state.shape[1:]), dtype))
    return mosaic_gpu.call(
        functools.partial(_kernel, plan=plan, chunks=chunks, save=save),
        name="delta_rule_forward",
        grid={"columns": values.shape[-1] // n, "heads": heads, "rows": batch},
        out_type=tuple(out),
        scratch=_scratch(stages, width, n, dtype, plan.decay),
        cost=cost,
        interpret=plan.interpret,
    )(*(q, k, erase, values), *([rows] if plan.decay else []), state)


def need(width: int, columns: int) -> int:
    """Bytes of shared memory."""
    return mosaic_gpu.nbytes(*_scratch(STAGES, width, columns, jnp.bfloat16, True).values())


def _scratch(stages, width, n, dtype, decay):
    return {
        **{name: tile((stages, CHUNK, width), dtype) for name in ("q_s", "k_s", "erase_s")},
        "values_s": tile((stages, CHUNK, n), dtype),
        **({"rows_s": plgpu.SMEM((stages, 4, CHUNK), jnp.float32)} if decay else {}),
        "pairs_s": tile((CHUNK, CHUNK), dtype),
        **{name: tile((CHUNK, n), dtype) for name in ("updates_s", "scaled_s", "y_s")},
        "low_s": tile((width, n), dtype),
        "state_s": tile((width, n), jnp.float32),
        "arrived": plgpu.Barrier(num_arrivals=4 + decay, num_barriers=stages),
        "begun": plgpu.Barrier(),
    }


def _kernel(q_ref, k_ref, erase_ref, values_ref, *rest, plan: Plan, chunks: int, save: bool, **s):
    rows_ref, (first_ref, y_ref, last_ref, *saved) = rest[: int(plan.decay)], rest[int(plan.decay) :]
    b, h = lax.axis_index("rows"), lax.axis_index("heads")
    columns = pl.ds(lax.axis_index("columns") * plan.columns, plan.columns)
    stages, dtype = s["k_s"].shape[0], values_ref.dtype
    state_shape, shape = s["low_s"].shape, s["y_s"].shape

    def fetch(i, slot):
        here, done = pl.ds(i * CHUNK, CHUNK), s["arrived"].at[slot]
        for ref, name in ((q_ref, "q_s"), (k_ref, "k_s"), (erase_ref, "erase_s")):
            plgpu.copy_gmem_to_smem(ref.at[b, here, h], s[name].at[slot], done)
        plgpu.copy_gmem_to_smem(values_ref.at[b, here, h, columns], s["values_s"].at[slot], done)
        if plan.decay:
            plgpu.copy_gmem_to_smem(rows_ref[0].at[b, i, h], s["rows_s"].at[slot], done)

    plgpu.copy_gmem_to_smem(first_ref.at[b, h, :, columns], s["state_s"], s["begun"])
    for i in range(stages):
        fetch(i, i)
    plgpu.barrier_wait(s["begun"])

    def step(i, state):
        slot = lax.rem(i, stages)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last chunk's outputs have left
        s["low_s"][...] = state.astype(dtype)
        plgpu.commit_smem()
        if save:
            plgpu.copy_smem_to_gmem(s["low_s"], saved[1].at[b, i, h, :, columns])
        plgpu.barrier_wait(s["arrived"].at[slot])
        q_s, k_s = s["q_s"].at[slot], s["k_s"].at[slot]
        rows_s = s["rows_s"].at[slot] if plan.decay else None
        pairs = product((CHUNK, CHUNK), (q_s, transposed(k_s))) * between(rows_s)
        updates = load(s["values_s"].at[slot]).astype(jnp.float32) - product(shape, (s["erase_s"].at[slot], s["low_s"]))
        s["pairs_s"][...], s["updates_s"][...] = pairs.astype(dtype), updates.astype(dtype)
        total = None
        since = None
        if plan.decay:
            total, since = rows_s[SINCE, CHUNK - 1], by_row(rows_s.at[SINCE])
            s["scaled_s"][...] = (updates * across(by_row(rows_s.at[UNTIL]), shape)).astype(dtype)
        plgpu.commit_smem()  # after the last read of this chunk's arrays: the next ones overwrite them
        if save:
            plgpu.copy_smem_to_gmem(s["updates_s"], saved[0].at[b, pl.ds(i * CHUNK, CHUNK), h, columns])
        if plan.decay:
            y = product(shape, (q_s, s["low_s"])) * across(since, shape) + product(
                shape, (s["pairs_s"], s["updates_s"])
            )
            state = state * total + product(state_shape, (transposed(k_s), s["scaled_s"]))
        else:
            y = product(shape, (q_s, s["low_s"]), (s["pairs_s"], s["updates_s"]))
            state = state + product(state_shape, (transposed(k_s), s["updates_s"]))
        s["y_s"][...] = y.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(s["y_s"], y_ref.at[b, pl.ds(i * CHUNK, CHUNK), h, columns])

        @pl.when(i + stages < chunks)
        def _():
            fetch(i + stages, slot)

        return state

    state = lax.fori_loop(0, chunks, step, load(s["state_s"]))
    s["state_s"][...] = state
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(s["state_s"], last_ref.at[b, h, :, columns])
    plgpu.wait_smem_to_gmem(0)
