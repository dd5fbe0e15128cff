"""The forward GPU kernel: chunks in order, the state in registers. README.md has the derivation."""

import functools
from typing import Any, NamedTuple

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
    """What a kernel is built from, all static."""

    columns: int  # of the values, a block
    decay: bool
    interpret: mosaic_gpu.Interpret


def forward(plan: Plan, q, k, v, rows, state, *, save: bool, cost: pl.CostEstimate):
    """y in the dtype of v, the last state, and with `save` the state before each chunk [B N H K V], else None.

    q, k [B T H K], v [B T H V], state [B H K V] float32; rows [B N H 4 C] of `decays`, or None.
    """
    (y,), last, states = _call(plan, "linear_attention_forward", (q, k, v), rows, state, save, False, cost)
    return y, last, states


def states_backward(plan: Plan, q, dy, rows, dlast, *, cost: pl.CostEstimate):
    """The gradient of the state after each chunk [B N H K V], in the dtype of q, and that of the first state.

    The same recurrence from behind: that before a chunk is that after it, decayed, and q^T (exp(since) dy).
    """
    name = "linear_attention_backward_states"
    _, first, states = _call(plan, name, (q, dy), rows, dlast, True, True, cost)
    return states, first


def _call(plan: Plan, name, tokens, rows, state, save, reverse, cost):
    """tokens: (queries, keys, values), or (keys, values) if only the states are wanted."""
    batch, length, heads, width = tokens[0].shape
    values, chunks, n = tokens[-1], length // CHUNK, plan.columns
    dtype, stages, read = values.dtype, min(STAGES, chunks), len(tokens) == 3
    scratch = {
        **({"q_s": tile((stages, CHUNK, width), dtype)} if read else {}),
        "k_s": tile((stages, CHUNK, width), dtype),
        "v_s": tile((stages, CHUNK, n), dtype),
        **({"rows_s": plgpu.SMEM((stages, 4, CHUNK), jnp.float32)} if plan.decay else {}),
        **({"scaled_s": tile((CHUNK, n), dtype)} if plan.decay else {}),
        **({"pairs_s": tile((CHUNK, CHUNK), dtype), "y_s": tile((CHUNK, n), dtype)} if read else {}),
        "low_s": tile((width, n), dtype),
        "state_s": tile((width, n), jnp.float32),
        "arrived": plgpu.Barrier(num_arrivals=len(tokens) + plan.decay, num_barriers=stages),
        "begun": plgpu.Barrier(),
    }
    out = [jax.ShapeDtypeStruct(values.shape, dtype)] if read else []
    out.append(jax.ShapeDtypeStruct(state.shape, jnp.float32))
    if save:
        out.append(jax.ShapeDtypeStruct((batch, chunks, *state.shape[1:]), dtype))
    results = mosaic_gpu.call(
        functools.partial(_kernel, plan=plan, chunks=chunks, read=read, save=save, reverse=reverse),
        name=name,
        grid={"columns": values.shape[-1] // n, "heads": heads, "rows": batch},
        out_type=tuple(out),
        scratch=scratch,
        cost=cost,
        interpret=plan.interpret,
    )(*tokens, *([rows] if plan.decay else []), state)
    y, (last, *states) = results[: int(read)], results[int(read) :]
    return y, last, states[0] if states else None


def _kernel(*refs, plan: Plan, chunks: int, read: bool, save: bool, reverse: bool, **scratch):
    given, s = list(refs), scratch
    q_ref: Any = given.pop(0) if read else None
    k_ref, v_ref = given.pop(0), given.pop(0)
    rows_ref: Any = given.pop(0) if plan.decay else None
    first_ref = given.pop(0)
    y_ref: Any = given.pop(0) if read else None
    last_ref = given.pop(0)
    states_ref: Any = given.pop(0) if save else None
    b, h = lax.axis_index("rows"), lax.axis_index("heads")
    columns = pl.ds(lax.axis_index("columns") * plan.columns, plan.columns)
    stages, dtype = s["k_s"].shape[0], v_ref.dtype
    shape = (s["low_s"].shape[0], plan.columns)  # of the state, [K n]

    def place(i):
        return chunks - 1 - i if reverse else i

    def fetch(i, slot):
        """Starts the copies of the i-th chunk in the order of the loop."""
        here, done = pl.ds(place(i) * CHUNK, CHUNK), s["arrived"].at[slot]
        if read:
            plgpu.copy_gmem_to_smem(q_ref.at[b, here, h], s["q_s"].at[slot], done)
        plgpu.copy_gmem_to_smem(k_ref.at[b, here, h], s["k_s"].at[slot], done)
        plgpu.copy_gmem_to_smem(v_ref.at[b, here, h, columns], s["v_s"].at[slot], done)
        if plan.decay:
            plgpu.copy_gmem_to_smem(rows_ref.at[b, place(i), h], s["rows_s"].at[slot], done)

    plgpu.copy_gmem_to_smem(first_ref.at[b, h, :, columns], s["state_s"], s["begun"])
    for i in range(stages):
        fetch(i, i)
    plgpu.barrier_wait(s["begun"])

    def step(i, state):
        slot = lax.rem(i, stages)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last chunk's results have left
        if read or save:
            s["low_s"][...] = state.astype(dtype)
            plgpu.commit_smem()
        if save:
            plgpu.copy_smem_to_gmem(s["low_s"], states_ref.at[b, place(i), h, :, columns])
        plgpu.barrier_wait(s["arrived"].at[slot])
        k_s, v_s = s["k_s"].at[slot], s["v_s"].at[slot]
        rows_s = s["rows_s"].at[slot] if plan.decay else None
        if read:
            q_s = s["q_s"].at[slot]
            pairs = product((CHUNK, CHUNK), (q_s, transposed(k_s)))
            s["pairs_s"][...] = (pairs * between(rows_s)).astype(dtype)
            plgpu.commit_smem()
            if plan.decay:
                y = product((CHUNK, plan.columns), (q_s, s["low_s"]))
                y = y * across(by_row(rows_s.at[SINCE]), y.shape)
                y += product(y.shape, (s["pairs_s"], v_s))
            else:
                y = product((CHUNK, plan.columns), (q_s, s["low_s"]), (s["pairs_s"], v_s))
            s["y_s"][...] = y.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(s["y_s"], y_ref.at[b, pl.ds(place(i) * CHUNK, CHUNK), h, columns])
        if plan.decay:
            kept, total = by_row(rows_s.at[SINCE if reverse else UNTIL]), rows_s[SINCE, CHUNK - 1]
            values = load(v_s).astype(jnp.float32)
            s["scaled_s"][...] = (values * across(kept, values.shape)).astype(dtype)
            plgpu.commit_smem()  # after the last read of this chunk's arrays: the next ones overwrite them
            state = state * total + product(shape, (transposed(k_s), s["scaled_s"]))
        else:
            state = state + product(shape, (transposed(k_s), v_s))

        @pl.when(i + stages < chunks)
        def _():
            fetch(i + stages, slot)

        return state

    state = lax.fori_loop(0, chunks, step, load(s["state_s"]))
    s["state_s"][...] = state
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(s["state_s"], last_ref.at[b, h, :, columns])
    plgpu.wait_smem_to_gmem(0)
