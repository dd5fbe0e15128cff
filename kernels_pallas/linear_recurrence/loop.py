"""One token after the other, in place: no array but the result is made. The quickest form on a CPU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact

from kernels_pallas.linear_recurrence.adjoint import with_adjoint


def linear_recurrence_loop(
    a: Inexact[Array, "B T D"] | Inexact[Array, " D"],
    b: Inexact[Array, "B T D"],
    state: Inexact[Array, "B D"],
    reset: Bool[Array, "B T"] | None,
    *,
    reverse: bool,
) -> tuple[Inexact[Array, "B T D"], Inexact[Array, "B D"]]:
    """api.linear_recurrence for inputs that all are real or all complex."""
    return _run(a, b, state, reset, reverse)


def _core(a, b, state, reset, reverse, after, dtype):
    length = b.shape[1]

    def token(i, carry):
        state, h = carry
        t = length - 1 - i if reverse else i
        a_t, b_t = a if a.ndim == 1 else _row(a, t), _row(b, t).astype(state.dtype)
        a_t = a_t.astype(state.dtype)
        if reset is not None:
            a_t = jnp.where(_row(reset, t)[:, None], 0, a_t)
        h_t = state + b_t if after else a_t * state + b_t
        h = jax.lax.dynamic_update_index_in_dim(h, h_t.astype(dtype), t, 1)
        return (a_t * h_t if after else h_t), h

    state, h = jax.lax.fori_loop(0, length, token, (state, jnp.zeros(b.shape, dtype)))
    return h, state


def _row(x, t):
    return jax.lax.dynamic_index_in_dim(x, t, 1, keepdims=False)


_run = with_adjoint(_core)
