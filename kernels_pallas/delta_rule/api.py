"""The delta rule: the public function, its checks and the choice of implementation."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import dispatch
from kernels_pallas.delta_rule.chunked import delta_rule_chunked
from kernels_pallas.delta_rule.pallas_gpu import delta_rule_gpu
from kernels_pallas.delta_rule.pallas_tpu import delta_rule_tpu
from kernels_pallas.delta_rule.ref import delta_rule_ref
from kernels_pallas.sharded import Axes

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "ref": delta_rule_ref,
    "chunked": delta_rule_chunked,
    "pallas_tpu": delta_rule_tpu,
    "pallas_gpu": delta_rule_gpu,  # not in AUTO until its time on a GPU is on record
}
AUTO = {"tpu": ("pallas_tpu", "chunked"), "default": ("chunked",)}  # by platform, in order of preference
AXES = Axes(ins=("B.H.", "B.H.", "B.H.", "B.H", "B.H", "BH.."), outs=("B.H.", "BH.."))


def delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"] | None = None,
    state: Float[Array, "B H K V"] | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  y_t = S_t^T q_t.

    Source: Schlag, Irie and Schmidhuber 2021, arXiv:2102.11174; chunkwise form of Yang et al. 2024, arXiv:2406.06484;
    with the decay g Gated DeltaNet, Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464. The papers write S transposed,
    [V K]. The memory first decays, then what it holds for k_t moves by beta_t towards v_t:
    S_t = S' + beta_t k_t (v_t - S'^T k_t)^T with S' = exp(g_t) S_{t-1}.

    The step along k_t has the eigenvalue 1 - beta_t |k_t|^2: keys of length 1 and beta in [0, 2] keep it within
    [-1, 1]; beyond, the memory may grow without bound.

    Args:
      q, k: queries and keys, any float dtype; q is not rescaled and k not normalised here.
      v: values.
      beta: the strength of each write. beta = 0 or k = 0 writes nothing (padding).
      log_decay: g, at most 0. None is 0. -inf forgets all before t exactly.
      state: S_0 in float32, zeros if None.
      implementation: a key of IMPLEMENTATIONS; None takes the first of AUTO for the platform that does not refuse.

    Returns:
      y in the dtype of v, and S_T in float32 (S_0 if T = 0). Sums run in float32 whatever the inputs.

    Raises:
      ValueError: shapes that do not fit. KeyError: unknown implementation.
      NotImplementedError: refused; the message gives the reason.
    """
    batch, _, heads, width = q.shape
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"delta_rule: q {q.shape}, k {k.shape} and v {v.shape} do not fit")
    for name, x in (("beta", beta), ("log_decay", log_decay)):
        if x is not None and x.shape != q.shape[:3]:
            raise ValueError(f"delta_rule: {name} {x.shape} must be [B T H] of q {q.shape}")
    if state is None:
        state = jnp.zeros((batch, heads, width, v.shape[-1]), jnp.float32)
    if state.shape != (batch, heads, width, v.shape[-1]):
        raise ValueError(f"delta_rule: state {state.shape} must be {(batch, heads, width, v.shape[-1])}")
    state = state.astype(jnp.float32)
    if 0 in v.shape or width == 0:
        dispatch.check("delta_rule", IMPLEMENTATIONS, implementation)
        return jnp.zeros_like(v), state
    args = (q, k, v, beta, log_decay, state)
    return dispatch.call(
        "delta_rule", IMPLEMENTATIONS, implementation, AUTO, *args, axes=AXES, dtypes=(v.dtype, jnp.float32)
    )
