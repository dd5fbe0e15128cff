"""Reference: one token at a time, float32 or complex64. Never optimised."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact


def linear_recurrence_ref(
    a: Inexact[Array, "B T D"] | Inexact[Array, " D"],
    b: Inexact[Array, "B T D"],
    state: Inexact[Array, "B D"],
    reset: Bool[Array, "B T"] | None,
    *,
    reverse: bool,
) -> tuple[Inexact[Array, "B T D"], Inexact[Array, "B D"]]:
    """api.linear_recurrence for inputs that all are real or all complex."""
    a = jnp.broadcast_to(a, b.shape)
    if reset is not None:
        a = jnp.where(reset[:, :, None], 0, a)

    def token(state, inputs):
        a_t, b_t = inputs  # [B D]
        state = a_t * state + b_t
        return state, state

    inputs = [x.astype(state.dtype).swapaxes(0, 1) for x in (a, b)]
    state, h = jax.lax.scan(token, state, inputs, reverse=reverse)
    return h.swapaxes(0, 1).astype(b.dtype), state
