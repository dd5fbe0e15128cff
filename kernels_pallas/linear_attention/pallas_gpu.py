"""Linear attention on GPU (Pallas Mosaic GPU, Hopper): padding and the gradient rule. README.md has the derivation.

Checked by interpretation and by lowering to a CUDA module only: no figure of speed is known yet.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels_pallas import costs, dispatch, mosaic_gpu
from kernels_pallas.gpu_decay import CHUNK, FORGET, decays
from kernels_pallas.linear_attention.pallas_gpu_backward import backward, need
from kernels_pallas.linear_attention.pallas_gpu_forward import Plan, forward, states_backward

COLUMNS = 64  # of the values, a block: its part of the state is at most 64 registers a thread


def linear_attention_gpu(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None,
    state: Float[Array, "B H K V"],
    *,
    interpret: mosaic_gpu.Interpret | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """y in the dtype of v and the last state of api.linear_attention, before any normalisation.

    A block of the GPU runs one row, one head and 64 columns of the values through all chunks of 64 tokens.

    Args:
      interpret: as mosaic_gpu.call; None as the context says.

    Raises:
      NotImplementedError: a decay a key channel, other dtypes than bfloat16 and float16, devices other than Hopper, or
        heads too wide for shared memory.
    """
    mosaic_gpu.refuse("linear_attention", dispatch.device_kind(), q, k, v)
    if log_decay is not None and log_decay.ndim == 4:
        raise NotImplementedError(
            "linear_attention: the GPU kernels take one decay a head; with one a key channel a chunk's pairs are no "
            "single matrix product, use 'chunked'"
        )
    mode = mosaic_gpu.interpreted() if interpret is None else mosaic_gpu.parameters(interpret)
    key_width, value_width = _width(q.shape[-1]), _width(v.shape[-1])
    if key_width > 128:
        raise NotImplementedError(
            f"linear_attention: K {key_width} > 128: the state would not fit into registers; use 'chunked'"
        )
    mosaic_gpu.refuse_bytes("linear_attention_backward", need(key_width, value_width, log_decay is not None))
    return _padded(Plan(COLUMNS, log_decay is not None, mode), q, k, v, log_decay, state)


def _width(size):
    return -(-size // 64) * 64


@functools.partial(jax.jit, static_argnums=0)
def _padded(plan: Plan, q, k, v, g, state):
    """Fills up lengths and widths with zeros, which write nothing and decay nothing, and cuts the results."""
    (_, length, _, key_width), value_width = q.shape, v.shape[-1]
    more, keys, values = -length % CHUNK, -key_width % 64, -value_width % 64
    q, k, v = _fill(q, 0, more, 0, keys), _fill(k, 0, more, 0, keys), _fill(v, 0, more, 0, values)
    arrays = [q, k, v, _fill(state, 0, 0, keys, values)]
    if g is not None:
        arrays.append(_fill(jnp.maximum(g.astype(jnp.float32), FORGET), 0, more, 0))
    y, last = _attend(plan, *arrays)
    return y[:, :length, :, :value_width], last[:, :, :key_width, :value_width]


def _fill(x, *ends):
    return jnp.pad(x, [(0, end) for end in ends]) if any(ends) else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, v, state, *g):
    return _forward(plan, q, k, v, state, *g, save=False)


def _forward(plan: Plan, q, k, v, state, *g, save):
    def run(q, k, v, state, *g):
        rows = decays(g[0]) if g else None
        results = forward(plan, q, k, v, rows, state, save=save, cost=_cost(q, v, plan, False))
        return results if save else results[:2]

    return mosaic_gpu.over_rows(run)(q, k, v, state, *g)


def _save(plan: Plan, q, k, v, state, *g):
    y, last, states = _forward(plan, q, k, v, state, *g, save=True)
    return (y, last), (q, k, v, states, *g)


def _backward(plan: Plan, saved, cotangents):
    dy, dlast = cotangents

    def run(q, k, v, states, dy, dlast, *g):
        rows = decays(g[0]) if g else None
        cost = _cost(q, v, plan, True)
        dstates, dfirst = states_backward(plan, q, dy, rows, dlast, cost=cost)
        return *backward(plan, q, k, v, dy, rows, states, dstates, cost=cost), dfirst

    q, k, v, states, *g = saved
    dq, dk, dv, *dg, dstate = mosaic_gpu.over_rows(run)(q, k, v, states, dy, dlast, *g)
    return dq, dk, dv, dstate, *dg


_attend.defvjp(_save, _backward)


def _cost(q, v, plan: Plan, backward: bool) -> pl.CostEstimate:
    """Of the forward kernel, or of each of the two backward kernels."""
    batch, length, heads, width = q.shape
    decay, size = "head" if plan.decay else None, q.dtype.itemsize
    return costs.linear_attention(
        *(batch, length, heads, width, v.shape[-1]), chunk=CHUNK, decay=decay, itemsize=size, backward=backward
    ).estimate(2 if backward else 1)
