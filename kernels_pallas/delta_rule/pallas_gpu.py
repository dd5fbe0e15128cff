"""The delta rule on GPU (Pallas Mosaic GPU, Hopper): padding and the gradient rule. README.md has the derivation.

XLA makes what does not need the state, for all chunks at once: the inverse of each chunk's triangle and with it the
writes in terms of the state, values - erase S. The kernels carry the state, and its gradient, through the chunks.
Checked by interpretation and by lowering to a CUDA module only: no figure of speed is known yet.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels_pallas import costs, dispatch, mosaic_gpu
from kernels_pallas.delta_rule import chunked, pallas_gpu_backward, pallas_gpu_backward_states
from kernels_pallas.delta_rule.pallas_gpu_backward import backward
from kernels_pallas.delta_rule.pallas_gpu_backward_states import backward_states
from kernels_pallas.delta_rule.pallas_gpu_forward import Plan, forward, need
from kernels_pallas.gpu_decay import CHUNK, FORGET, decays

COLUMNS = 64  # of the values, a block: its part of the state is at most 64 registers a thread


def delta_rule_gpu(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"] | None,
    state: Float[Array, "B H K V"],
    *,
    interpret: mosaic_gpu.Interpret | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """y in the dtype of v and the last state of api.delta_rule.

    A block of the GPU runs one row, one head and 64 columns of the values through all chunks of 64 tokens.

    Args:
      interpret: as mosaic_gpu.call; None as the context says.

    Raises:
      NotImplementedError: other dtypes than bfloat16 and float16, devices other than Hopper, or heads too
        wide for registers or shared memory.
    """
    mosaic_gpu.refuse("delta_rule", dispatch.device_kind(), q, k, v)
    width, deep = (-(-x.shape[-1] // 64) * 64 for x in (q, v))
    if width > 128:
        raise NotImplementedError(f"delta_rule: K {width} > 128: the state would not fit into registers; use 'chunked'")
    mosaic_gpu.refuse_bytes("delta_rule_forward", need(width, COLUMNS))
    mosaic_gpu.refuse_bytes("delta_rule_backward_states", pallas_gpu_backward_states.need(width, COLUMNS))
    mosaic_gpu.refuse_bytes("delta_rule_backward", pallas_gpu_backward.need(width, deep))
    mode = mosaic_gpu.interpreted() if interpret is None else mosaic_gpu.parameters(interpret)
    return _padded(Plan(COLUMNS, log_decay is not None, mode), q, k, v, beta, log_decay, state)


@functools.partial(jax.jit, static_argnums=0)
def _padded(plan: Plan, q, k, v, beta, g, state):
    """Fills up lengths and widths with zeros, which write nothing and decay nothing, and cuts the results."""
    (_, length, _, width), deep = q.shape, v.shape[-1]
    more, keys, values = -length % CHUNK, -width % 64, -deep % 64
    q, k, v = _fill(q, 0, more, 0, keys), _fill(k, 0, more, 0, keys), _fill(v, 0, more, 0, values)
    arrays = [q, k, v, _fill(beta.astype(jnp.float32), 0, more, 0), _fill(state, 0, 0, keys, values)]
    if g is not None:
        arrays.append(_fill(jnp.maximum(g.astype(jnp.float32), FORGET), 0, more, 0))
    y, last = _delta(plan, *arrays)
    return y[:, :length, :, :deep], last[:, :, :width, :deep]


def _fill(x, *ends):
    return jnp.pad(x, [(0, end) for end in ends]) if any(ends) else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _delta(plan: Plan, q, k, v, beta, state, *g):
    return _forward(plan, q, k, v, beta, state, *g, save=False)


def _forward(plan: Plan, q, k, v, beta, state, *g, save):
    def run(q, k, v, beta, state, *g):
        with jax.default_matmul_precision("highest"):  # a GPU's default rounds float32 to 10 bits
            x = chunked._split(CHUNK, {"k": k, "v": v, "beta": beta, "g": g[0] if g else None})
            erase, values, _, _ = chunked._transform(x["k"], x["v"], x["beta"], chunked._decay(x["g"]))
        erase, values = (chunked._join(part).astype(v.dtype) for part in (erase, values))
        rows = decays(g[0]) if g else None
        return tuple(forward(plan, q, k, erase, values, rows, state, save=save, cost=_cost(plan, q, v, False)))

    return mosaic_gpu.over_rows(run)(q, k, v, beta, state, *g)


def _save(plan: Plan, q, k, v, beta, state, *g):
    y, last, updates, states = _forward(plan, q, k, v, beta, state, *g, save=True)
    return (y, last), (q, k, v, beta, updates, states, *g)


def _backward(plan: Plan, saved, cotangents):
    dy, dlast = cotangents

    def run(q, k, v, beta, updates, states, dy, dlast, *g):
        with jax.default_matmul_precision("highest"):
            x = chunked._split(CHUNK, {"k": k, "beta": beta, "g": g[0] if g else None})
            decay = chunked._decay(x["g"])
            triangle = chunked._among(x["k"], x["beta"][..., None], 1.0 if decay is None else decay[0])
            inverse = chunked._join(chunked._inverse(triangle)).astype(q.dtype)
        rows, cost = decays(g[0]) if g else None, _cost(plan, q, v, True)
        each = beta.reshape(beta.shape[0], -1, CHUNK, beta.shape[2]).swapaxes(2, 3)  # [B N H C]
        dscaled, dstates, dfirst = backward_states(plan, q, k, inverse, dy, each, rows, dlast, cost=cost)
        grads = backward(plan, q, k, v, updates, dscaled, dy, each, rows, states, dstates, cost=cost)
        return *grads, dfirst

    q, k, v, beta, updates, states, *g = saved
    dq, dk, dv, dbeta, *dg, dstate = mosaic_gpu.over_rows(run)(q, k, v, beta, updates, states, dy, dlast, *g)
    return dq, dk, dv, dbeta, dstate, *dg


_delta.defvjp(_save, _backward)


def _cost(plan: Plan, q, v, backward: bool) -> pl.CostEstimate:
    """Of the forward kernel, or of each of the two backward kernels."""
    sizes, size = (*q.shape, v.shape[-1]), q.dtype.itemsize
    cost = costs.delta_rule(*sizes, chunk=CHUNK, gated=plan.decay, itemsize=size, backward=backward)
    return cost.estimate(2 if backward else 1)
