"""Linear recurrence: the public function, its checks and the choice of implementation."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact

from kernels_pallas import dispatch
from kernels_pallas.linear_recurrence.chunked import linear_recurrence_chunked
from kernels_pallas.linear_recurrence.loop import linear_recurrence_loop
from kernels_pallas.linear_recurrence.pallas_tpu import linear_recurrence_tpu
from kernels_pallas.linear_recurrence.ref import linear_recurrence_ref
from kernels_pallas.sharded import Axes

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "ref": linear_recurrence_ref,
    "loop": linear_recurrence_loop,
    "chunked": linear_recurrence_chunked,
    "pallas_tpu": linear_recurrence_tpu,
}
AUTO = {"tpu": ("pallas_tpu", "chunked"), "cpu": ("loop", "chunked"), "default": ("chunked", "loop")}


def linear_recurrence(
    a: Inexact[Array, "B T D"] | Inexact[Array, " D"],
    b: Inexact[Array, "B T D"],
    state: Inexact[Array, "B D"] | None = None,
    *,
    reset: Bool[Array, "B T"] | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Inexact[Array, "B T D"], Inexact[Array, "B D"]]:
    """h_t = a_t h_{t-1} + b_t, elementwise, real or complex. reverse: h_t = a_t h_{t+1} + b_t, from the end.

    Sources: the diagonal state space models S5, Smith et al. 2023, arXiv:2208.04933, and LRU, Orvieto et al. 2023,
    arXiv:2303.06349; the parallel form is Blelloch's scan (1990). Exact for any a: a = 0 forgets, and products of
    many small a may underflow; nothing is divided by them.

    Args:
      a: one a token and channel, or [D], the same for all tokens (time-invariant), which is then never spread out.
      b: inputs, any float dtype or complex64. Where a or state is complex and b is not, b counts as complex.
      state: h_0, what stands before the first token read; zeros if None.
      reset: True where a_t counts as 0, so that token t does not see the state.
      reverse: reads the tokens from the last to the first; state stands behind the last.
      implementation: a key of IMPLEMENTATIONS; None takes the first of AUTO's, for the platform, that does not refuse.

    Returns:
      h in the dtype of b, and the state after the last token read (h_0 if T = 0) in float32 or complex64, in which
      the recurrence runs whatever the inputs.

    Raises:
      ValueError: shapes that do not fit. KeyError: unknown implementation.
      NotImplementedError: refused; the message gives the reason.
    """
    batch, length, width = b.shape
    if a.shape not in (b.shape, (width,)):
        raise ValueError(f"linear_recurrence: a {a.shape} must be [D] or [B T D] of b {b.shape}")
    if state is not None and state.shape != (batch, width):
        raise ValueError(f"linear_recurrence: state {state.shape} must be {(batch, width)}")
    if reset is not None and reset.shape != (batch, length):
        raise ValueError(f"linear_recurrence: reset {reset.shape} must be {(batch, length)}")
    given = [a, b] if state is None else [a, b, state]
    if any(jnp.iscomplexobj(x) for x in given):
        a, b = a.astype(jnp.complex64), b.astype(jnp.complex64)
    dtype = jnp.complex64 if jnp.iscomplexobj(b) else jnp.float32
    state = jnp.zeros((batch, width), dtype) if state is None else state.astype(dtype)
    if b.size == 0:
        dispatch.check("linear_recurrence", IMPLEMENTATIONS, implementation)
        return b, state
    return dispatch.call(
        "linear_recurrence",
        IMPLEMENTATIONS,
        implementation,
        AUTO,
        *(a, b, state, reset),
        axes=Axes(("H" if a.ndim == 1 else "B.H", "B.H", "BH", "B."), ("B.H", "BH")),
        dtypes=(b.dtype, dtype),
        reverse=reverse,
    )
