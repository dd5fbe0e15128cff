"""The backward GPU kernel of the inputs: every chunk on its own, given the states around it.

README.md has the derivation.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import mosaic_gpu
from kernels_pallas.gpu_decay import CHUNK, SINCE, UNTIL, between, decay_gradient
from kernels_pallas.linear_attention.pallas_gpu_forward import Plan
from kernels_pallas.mosaic_gpu import across, by_row, load, product, tile, transposed


def backward(plan: Plan, q, k, v, dy, rows, states, dstates, *, cost: pl.CostEstimate):
    """Gradients of q, k, v, and with a decay of g [B T H].

    states, dstates [B N H K V]: the state before each chunk, and the gradient of the state after it.
    """
    batch, length, heads, width = q.shape
    chunks = length // CHUNK
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    if plan.decay:
        out.append(jax.ShapeDtypeStruct((batch, chunks, heads, 4, CHUNK), jnp.float32))
        out.append(jax.ShapeDtypeStruct((batch, chunks, heads, width), jnp.float32))
    dq, dk, dv, *parts = mosaic_gpu.call(
        functools.partial(_kernel, plan=plan),
        name="linear_attention_backward",
        grid={"chunks": chunks, "heads": heads, "rows": batch},
        out_type=tuple(out),
        scratch=_scratch(width, v.shape[-1], q.dtype, plan.decay),
        cost=cost,
        interpret=plan.interpret,
    )(*(q, k, v, dy, states, dstates), *([rows] if plan.decay else []))
    return dq, dk, dv, *([decay_gradient(parts[0], parts[1], rows)] if plan.decay else [])


def need(keys: int, values: int, decay: bool) -> int:
    """Bytes of shared memory."""
    return mosaic_gpu.nbytes(*_scratch(keys, values, jnp.bfloat16, decay).values())


def _scratch(keys, values, dtype, decay):
    return {
        "q_s": tile((CHUNK, keys), dtype),
        "k_s": tile((CHUNK, keys), dtype),
        "v_s": tile((CHUNK, values), dtype),
        "dy_s": tile((CHUNK, values), dtype),
        "state_s": tile((keys, values), dtype),
        "dstate_s": tile((keys, values), dtype),
        "pairs_s": tile((CHUNK, CHUNK), dtype),
        "dpairs_s": tile((CHUNK, CHUNK), dtype),
        "dkeys_s": tile((CHUNK, keys), dtype),
        "dvalues_s": tile((CHUNK, values), dtype),
        **({"rows_s": plgpu.SMEM((4, CHUNK), jnp.float32)} if decay else {}),
        **({"parts_s": plgpu.SMEM((4, CHUNK), jnp.float32)} if decay else {}),
        **({"whole_s": plgpu.SMEM((keys,), jnp.float32)} if decay else {}),
        "arrived": plgpu.Barrier(num_arrivals=6 + decay),
    }


def _kernel(*refs, plan: Plan, **s):
    q_ref, k_ref, v_ref, dy_ref, states_ref, dstates_ref, *rest = refs
    rows_ref: Any = rest.pop(0) if plan.decay else None
    dq_ref, dk_ref, dv_ref, *rest = rest
    b, n, h = (lax.axis_index(name) for name in ("rows", "chunks", "heads"))
    tokens, done = (b, pl.ds(n * CHUNK, CHUNK), h), s["arrived"]
    for ref, name in ((q_ref, "q_s"), (k_ref, "k_s"), (v_ref, "v_s"), (dy_ref, "dy_s")):
        plgpu.copy_gmem_to_smem(ref.at[tokens], s[name], done)
    plgpu.copy_gmem_to_smem(states_ref.at[b, n, h], s["state_s"], done)
    plgpu.copy_gmem_to_smem(dstates_ref.at[b, n, h], s["dstate_s"], done)
    if plan.decay:
        plgpu.copy_gmem_to_smem(rows_ref.at[b, n, h], s["rows_s"], done)
    plgpu.barrier_wait(done)

    q_s, k_s, v_s, dy_s, state_s, dstate_s = (s[n] for n in ("q_s", "k_s", "v_s", "dy_s", "state_s", "dstate_s"))
    rows_s: Any = s.get("rows_s")
    dtype = q_ref.dtype
    keys, values = q_s.shape[1], v_s.shape[1]

    decay = between(rows_s)  # [t s]
    pairs = product((CHUNK, CHUNK), (q_s, transposed(k_s))) * decay
    dpairs = product((CHUNK, CHUNK), (dy_s, transposed(v_s))) * decay  # of q . k
    s["pairs_s"][...], s["dpairs_s"][...] = pairs.astype(dtype), dpairs.astype(dtype)
    plgpu.commit_smem()
    if plan.decay:
        plain = product((CHUNK, CHUNK), (dy_s, transposed(v_s)))
        crossing = plain * pairs
        s["parts_s"][0, :] = crossing.sum(1)
        s["parts_s"][1, :] = crossing.sum(0)

    # dq = dpairs k + since (dy S^T)
    if plan.decay:
        dq = product((CHUNK, keys), (dy_s, transposed(state_s)))
        dq = dq * across(by_row(rows_s.at[SINCE]), dq.shape)
        s["parts_s"][2, :] = (dq * load(q_s).astype(jnp.float32)).sum(1)
        dq += product(dq.shape, (s["dpairs_s"], k_s))
    else:
        dq = product((CHUNK, keys), (dy_s, transposed(state_s)), (s["dpairs_s"], k_s))
    _give(s["dkeys_s"], dq, dq_ref.at[tokens])

    # dv = pairs^T dy + until (k dS)
    if plan.decay:
        dv = product((CHUNK, values), (k_s, dstate_s))
        dv = dv * across(by_row(rows_s.at[UNTIL]), dv.shape)
        dv += product(dv.shape, (transposed(s["pairs_s"]), dy_s))
    else:
        dv = product((CHUNK, values), (k_s, dstate_s), (transposed(s["pairs_s"]), dy_s))
    _give(s["dvalues_s"], dv, dv_ref.at[tokens])

    # dk = dpairs^T q + until (v dS^T)
    if plan.decay:
        dk = product((CHUNK, keys), (v_s, transposed(dstate_s)))
        dk = dk * across(by_row(rows_s.at[UNTIL]), dk.shape)
        s["parts_s"][3, :] = (dk * load(k_s).astype(jnp.float32)).sum(1)
        dk += product(dk.shape, (transposed(s["dpairs_s"]), q_s))
    else:
        dk = product((CHUNK, keys), (v_s, transposed(dstate_s)), (transposed(s["dpairs_s"]), q_s))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    _give(s["dkeys_s"], dk, dk_ref.at[tokens])

    if plan.decay:
        parts_ref, whole_ref = rest
        for first in range(0, keys, CHUNK):
            some = pl.ds(first, CHUNK)
            both = load(state_s.at[some]).astype(jnp.float32) * load(dstate_s.at[some]).astype(jnp.float32)
            s["whole_s"][some] = both.sum(1)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(s["parts_s"], parts_ref.at[b, n, h])
        plgpu.copy_smem_to_gmem(s["whole_s"], whole_ref.at[b, n, h])
    plgpu.wait_smem_to_gmem(0)


def _give(shared, value, ref):
    shared[...] = value.astype(shared.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared, ref)
