"""Selective scan: the public function, its checks and the choice of implementation."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas import dispatch
from kernels_pallas.selective_scan.chunked import selective_scan_chunked
from kernels_pallas.selective_scan.pallas_tpu import selective_scan_tpu
from kernels_pallas.selective_scan.ref import selective_scan_ref
from kernels_pallas.sharded import Axes


def _with_skip(scan: Callable[..., Any]) -> Callable[..., Any]:
    def run(u, delta, A, B, C, D, state, reset):
        y, state = scan(u, delta, A, B, C, state, reset)
        return y if D is None else y + D.astype(jnp.float32) * u, state

    return run


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "ref": _with_skip(selective_scan_ref),
    "chunked": _with_skip(selective_scan_chunked),
    "pallas_tpu": selective_scan_tpu,
}
AUTO = {"tpu": ("pallas_tpu", "chunked"), "default": ("chunked",)}  # in order of preference
AXES = Axes(("B.H", "B.H", "H.", "B..", "B..", "H", "BH.", "B."), ("B.H", "BH."))


def selective_scan(
    u: Float[Array, "B T D"],
    delta: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    D: Float[Array, " D"] | None = None,
    state: Float[Array, "B D N"] | None = None,
    *,
    reset: Bool[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """A diagonal state-space model whose step, input and output depend on the token, one of N states a channel:

        h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t        y_t = h_t C_t + D u_t

    Source: Gu & Dao 2023, arXiv:2312.00752, algorithm 2 with the discretisation of their code: exact (zero-order
    hold) for A, Euler's for B.

    Args:
      u: the input, any float dtype.
      delta: the step sizes, at least 0: after the softplus. delta_t = 0 leaves the state as it is: padding.
      A: the rates, at most 0.
      B, C: what enters the state and what is read from it, shared by the channels.
      D: weight of the skip connection; None is 0.
      state: h_0 in float32, zeros if None. One step of T is one token.
      reset: True where the state is forgotten before the token is read: the first token of a packed sequence.
      implementation: a key of IMPLEMENTATIONS; None takes the first of AUTO's, for the platform, that does not refuse.

    Returns:
      y in the dtype of u, and h_T in float32 (h_0 if T = 0). Sums run in float32 whatever the inputs.

    Raises:
      ValueError: shapes that do not fit. KeyError: unknown implementation.
      NotImplementedError: refused; the message gives the reason.
    """
    batch, length, width = u.shape
    size = A.shape[-1]
    pairs = (batch, length, size)
    if delta.shape != u.shape or A.shape != (width, size) or B.shape != pairs or C.shape != pairs:
        shapes = f"u {u.shape}, delta {delta.shape}, A {A.shape}, B {B.shape} and C {C.shape}"
        raise ValueError(f"selective_scan: {shapes} must be [B T D], [B T D], [D N], [B T N] and [B T N]")
    if D is not None and D.shape != (width,):
        raise ValueError(f"selective_scan: D {D.shape} must be {(width,)}")
    if reset is not None and reset.shape != (batch, length):
        raise ValueError(f"selective_scan: reset {reset.shape} must be {(batch, length)}")
    if state is None:
        state = jnp.zeros((batch, width, size), jnp.float32)
    if state.shape != (batch, width, size):
        raise ValueError(f"selective_scan: state {state.shape} must be {(batch, width, size)}")
    A, state = A.astype(jnp.float32), state.astype(jnp.float32)
    if 0 in u.shape or size == 0:
        dispatch.check("selective_scan", IMPLEMENTATIONS, implementation)
        return (jnp.zeros(u.shape) if D is None else D.astype(jnp.float32) * u).astype(u.dtype), state
    return dispatch.call(
        "selective_scan",
        IMPLEMENTATIONS,
        implementation,
        AUTO,
        *(u, delta, A, B, C, D, state, reset),
        axes=AXES,
        dtypes=(u.dtype, jnp.float32),
    )
