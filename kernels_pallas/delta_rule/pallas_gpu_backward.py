"""The backward GPU kernel of the inputs: every chunk on its own, given the states around it. README.md has the
derivation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import mosaic_gpu
from kernels_pallas.delta_rule.pallas_gpu_forward import Plan
from kernels_pallas.gpu_decay import CHUNK, SINCE, UNTIL, between, decay_gradient
from kernels_pallas.mosaic_gpu import across, by_row, load, numbers, product, tile, transposed

BETA = 4  # row of the parts: after the four of the decay


def backward(plan: Plan, q, k, v, updates, dscaled, dy, beta, rows, states, dstates, *, cost: pl.CostEstimate):
    """Gradients of q, k, v, beta [B T H] float32, and with a decay of g [B T H] float32.

    updates (U) and dscaled (dX) [B T H V]; states and dstates [B N H K V]: the state before each chunk, and the
    gradient of the state after it; beta [B N H C] float32.
    """
    batch, length, heads, width = q.shape
    chunks = length // CHUNK
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    out.append(jax.ShapeDtypeStruct((batch, chunks, heads, 5 if plan.decay else 1, CHUNK), jnp.float32))
    if plan.decay:
        out.append(jax.ShapeDtypeStruct((batch, chunks, heads, width), jnp.float32))
    dq, dk, dv, parts, *whole = mosaic_gpu.call(
        functools.partial(_kernel, plan=plan),
        name="delta_rule_backward",
        grid={"chunks": chunks, "heads": heads, "rows": batch},
        out_type=tuple(out),
        scratch=_scratch(width, v.shape[-1], q.dtype, plan.decay),
        cost=cost,
        interpret=plan.interpret,
    )(*(q, k, v, updates, dscaled, dy, states, dstates, beta), *([rows] if plan.decay else []))
    dbeta = parts[..., -1, :].swapaxes(2, 3).reshape(batch, length, heads)
    return dq, dk, dv, dbeta, *(decay_gradient(parts[..., :BETA, :], x, rows) for x in whole)


def need(keys: int, values: int) -> int:
    """Bytes of shared memory."""
    return mosaic_gpu.nbytes(*_scratch(keys, values, jnp.bfloat16, True).values())


def _scratch(keys, values, dtype, decay):
    return {
        **{name: tile((CHUNK, keys), dtype) for name in ("q_s", "k_s", "dkeys_s")},
        **{name: tile((CHUNK, values), dtype) for name in ("v_s", "updates_s", "dscaled_s", "dy_s", "dvalues_s")},
        **{name: tile((keys, values), dtype) for name in ("state_s", "dstate_s")},
        **{name: tile((CHUNK, CHUNK), dtype) for name in ("dalike_s", "dpairs_s")},
        "beta_s": plgpu.SMEM((CHUNK,), jnp.float32),
        "parts_s": plgpu.SMEM((5 if decay else 1, CHUNK), jnp.float32),
        **({"rows_s": plgpu.SMEM((4, CHUNK), jnp.float32)} if decay else {}),
        **({"whole_s": plgpu.SMEM((keys,), jnp.float32)} if decay else {}),
        "arrived": plgpu.Barrier(num_arrivals=9 + decay),
    }


def _kernel(*refs, plan: Plan, **s):
    q_ref, k_ref, v_ref, updates_ref, dscaled_ref, dy_ref, states_ref, dstates_ref, beta_ref, *rest = refs
    rows_ref: Any = rest.pop(0) if plan.decay else None
    dq_ref, dk_ref, dv_ref, parts_ref, *whole_ref = rest
    b, n, h = (lax.axis_index(name) for name in ("rows", "chunks", "heads"))
    tokens, done = (b, pl.ds(n * CHUNK, CHUNK), h), s["arrived"]
    given = {
        "q_s": q_ref,
        "k_s": k_ref,
        "v_s": v_ref,
        "updates_s": updates_ref,
        "dscaled_s": dscaled_ref,
        "dy_s": dy_ref,
    }
    for name, ref in given.items():
        plgpu.copy_gmem_to_smem(ref.at[tokens], s[name], done)
    for name, ref in (("state_s", states_ref), ("dstate_s", dstates_ref), ("beta_s", beta_ref)):
        plgpu.copy_gmem_to_smem(ref.at[b, n, h], s[name], done)
    if plan.decay:
        plgpu.copy_gmem_to_smem(rows_ref.at[b, n, h], s["rows_s"], done)
    plgpu.barrier_wait(done)

    q_s, k_s, updates_s, dscaled_s, dy_s = (s[n] for n in ("q_s", "k_s", "updates_s", "dscaled_s", "dy_s"))
    state_s, dstate_s, parts_s = s["state_s"], s["dstate_s"], s["parts_s"]
    rows_s: Any = s.get("rows_s")
    dtype, pair = q_ref.dtype, (CHUNK, CHUNK)
    keys, values = q_s.shape, updates_s.shape
    by_beta: Any = by_row(s["beta_s"])
    since: Any = by_row(rows_s.at[SINCE]) if plan.decay else None

    # d(G o Q K^T) = dY U^T, s <= t;  d(beta G o K K^T) = -dX U^T, s < t
    decay = between(rows_s)
    dpairs = product(pair, (dy_s, transposed(updates_s))) * decay
    s["dpairs_s"][...] = dpairs.astype(dtype)
    crossing: Any = None
    if plan.decay:
        crossing = dpairs * product(pair, (q_s, transposed(k_s)))
    damong = -product(pair, (dscaled_s, transposed(updates_s))) * decay
    damong = jnp.where(numbers(pair, 0) > numbers(pair, 1), damong, 0.0)
    s["dalike_s"][...] = (damong * across(by_beta, pair)).astype(dtype)
    plgpu.commit_smem()
    damong = damong * product(pair, (k_s, transposed(k_s)))
    dbeta = damong.sum(1)
    if plan.decay:
        crossing = crossing + damong * across(by_beta, pair)
        parts_s[0, :] = crossing.sum(1)
        parts_s[1, :] = crossing.sum(0)

    # dv = beta dX;  dbeta: also of X = beta (V - c K S)
    found = product(values, (k_s, state_s))
    if plan.decay:
        found = found * across(since, values)
    missing = load(s["v_s"]).astype(jnp.float32) - found
    dscaled = load(dscaled_s).astype(jnp.float32)
    parts_s[parts_s.shape[0] - 1, :] = dbeta + (dscaled * missing).sum(1)
    _give(s["dvalues_s"], dscaled * across(by_beta, values), dv_ref.at[tokens])

    # dq = c (dY S^T) + d(Q K^T) k
    dq = product(keys, (dy_s, transposed(state_s)))
    along: Any = None
    if plan.decay:
        dq = dq * across(since, keys)
        along = (dq * load(q_s).astype(jnp.float32)).sum(1)
    dq = dq + product(keys, (s["dpairs_s"], k_s))
    _give(s["dkeys_s"], dq, dq_ref.at[tokens])

    # dk = -c beta (dX S^T) + until (U dS^T) + d(K K^T) k + d(K K^T)^T k + d(Q K^T)^T q
    dk = product(keys, (dscaled_s, transposed(state_s))) * across(-by_beta, keys)
    if plan.decay:
        dk = dk * across(since, keys)
        parts_s[2, :] = along + (dk * load(k_s).astype(jnp.float32)).sum(1)
        after = product(keys, (updates_s, transposed(dstate_s))) * across(by_row(rows_s.at[UNTIL]), keys)
        parts_s[3, :] = (after * load(k_s).astype(jnp.float32)).sum(1)
        dk = dk + after
    else:
        dk = dk + product(keys, (updates_s, transposed(dstate_s)))
    dk = dk + product(keys, (s["dalike_s"], k_s), (transposed(s["dalike_s"]), k_s), (transposed(s["dpairs_s"]), q_s))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    _give(s["dkeys_s"], dk, dk_ref.at[tokens])

    if plan.decay:
        for first in range(0, keys[1], CHUNK):
            some = pl.ds(first, CHUNK)
            both = load(state_s.at[some]).astype(jnp.float32) * load(dstate_s.at[some]).astype(jnp.float32)
            s["whole_s"][some] = both.sum(1)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(s["whole_s"], whole_ref[0].at[b, n, h])
    plgpu.copy_smem_to_gmem(parts_s, parts_ref.at[b, n, h])
    plgpu.wait_smem_to_gmem(0)


def _give(shared, value, ref):
    shared[...] = value.astype(shared.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared, ref)
