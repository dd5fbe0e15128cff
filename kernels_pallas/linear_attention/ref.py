"""Reference: one token at a time, float32. Never optimised."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def linear_attention_ref(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None,
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """y (float32) and the last state of api.linear_attention, before any normalisation."""
    if log_decay is None:
        log_decay = jnp.zeros(q.shape[:3], jnp.float32)
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]

    def token(state, inputs):
        q_t, k_t, v_t, g_t = inputs  # [B H K], [B H K], [B H V], [B H K or 1]
        state = jnp.exp(g_t)[..., None] * state + k_t[..., None] * v_t[..., None, :]
        return state, jnp.einsum("bhk,bhkv->bhv", q_t, state, precision="highest")

    inputs = [x.astype(jnp.float32).swapaxes(0, 1) for x in (q, k, v, log_decay)]
    state, y = jax.lax.scan(token, state, inputs)
    return y.swapaxes(0, 1), state
