"""The delta rule on GPU (Pallas Mosaic GPU, Hopper), forward. README.md has the derivation.

XLA makes what does not need the state, for all chunks at once: the inverse of each chunk's triangle and with it the
writes in terms of the state, values - erase S. The kernel carries the state through the chunks. The backward pass is
that of `chunked`, which starts again from the inputs; there is no kernel for it. Checked by interpretation and by
lowering to a CUDA module only: no figure of speed is known yet.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import costs, dispatch, mosaic_gpu
from kernels_pallas.delta_rule import chunked
from kernels_pallas.delta_rule.pallas_gpu_forward import Plan, forward, need
from kernels_pallas.gpu_decay import CHUNK, FORGET, decays


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
      NotImplementedError: other dtypes than bfloat16 and float16, devices other than Hopper, or keys wider than 256.
    """
    mosaic_gpu.refuse("delta_rule", dispatch.device_kind(), q, k, v)
    width = -(-q.shape[-1] // 64) * 64
    if width > 256:
        raise NotImplementedError(f"delta_rule: K {width} > 256: the state would not fit into registers")
    columns = 64 if width <= 128 else 32  # the state's part of a block: at most 64 registers a thread
    mosaic_gpu.refuse_bytes("delta_rule_forward", need(width, columns))
    mode = mosaic_gpu.interpreted() if interpret is None else mosaic_gpu.parameters(interpret)
    return _jitted(Plan(columns, log_decay is not None, mode), q, k, v, beta, log_decay, state)


@functools.partial(jax.jit, static_argnums=0)
def _jitted(plan: Plan, *args):
    return _delta(plan, *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _delta(plan: Plan, q, k, v, beta, log_decay, state):
    gates = () if log_decay is None else (log_decay,)
    return mosaic_gpu.over_rows(functools.partial(_forward, plan))(q, k, v, beta, state, *gates)


def _forward(plan: Plan, q, k, v, beta, state, *gates):
    (batch, length, heads, width), deep = q.shape, v.shape[-1]
    more, keys, columns = -length % CHUNK, -width % 64, -deep % 64
    q, k, v, beta = (_fill(x, 0, more, 0, *end) for x, end in ((q, [keys]), (k, [keys]), (v, [columns]), (beta, [])))
    g = _fill(jnp.maximum(gates[0].astype(jnp.float32), FORGET), 0, more, 0) if gates else None
    with jax.default_matmul_precision("highest"):  # a GPU's default rounds float32 to 10 bits, sums of decays too
        x = chunked._split(CHUNK, {"k": k, "v": v, "beta": beta, "g": g})
        erase, values, _, _ = chunked._transform(x["k"], x["v"], x["beta"], chunked._decay(x["g"]))
    erase, values = (chunked._join(part).astype(v.dtype) for part in (erase, values))
    sizes = (batch, length, heads, width, deep)
    cost = costs.delta_rule(*sizes, chunk=CHUNK, gated=plan.decay, itemsize=q.dtype.itemsize).estimate()
    rows = None if g is None else decays(g)
    y, last = forward(plan, q, k, erase, values, rows, _fill(state, 0, 0, keys, columns), cost=cost)
    return y[:, :length, :, :deep], last[:, :, :width, :deep]


def _fill(x, *ends):
    return jnp.pad(x, [(0, end) for end in ends]) if any(ends) else x


def _backward(plan: Plan, saved, cotangents):
    dy, dlast = cotangents
    return jax.vjp(chunked.delta_rule_chunked, *saved)[1]((dy.astype(jnp.float32), dlast))


_delta.defvjp(lambda plan, *args: (_delta(plan, *args), args), _backward)
