"""Reference: one key at a time, float32. Never optimised."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def decode_attention_ref(
    q: Float[Array, "B H K"],
    k_cache: Float[Array, "B S G K"],
    v_cache: Float[Array, "B S G V"],
    lengths: Int[Array, " B"],
    *,
    window: int | None,
    scale: float,
) -> tuple[Float[Array, "B H V"]]:
    """(y,) of api.decode_attention: the largest score, the sum of the weights and the weighted sum, key by key."""
    heads, groups = q.shape[1], k_cache.shape[2]
    first = jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - window, 0)
    q = q.astype(jnp.float32)

    def key(carry, inputs):
        largest, total, y = carry  # [B H], [B H], [B H V]
        k_s, v_s, s = inputs
        k_s, v_s = (jnp.repeat(a.astype(jnp.float32), heads // groups, axis=1) for a in (k_s, v_s))
        seen = ((first <= s) & (s < lengths))[:, None]
        score = jnp.where(seen, scale * (q * k_s).sum(-1), -jnp.inf)
        larger = jnp.maximum(largest, score)
        old, new = (jnp.where(seen, jnp.exp(a - larger), b) for a, b in ((largest, 1.0), (score, 0.0)))
        v_s = jnp.where(seen[..., None], v_s, 0)
        return (larger, old * total + new, old[..., None] * y + new[..., None] * v_s), None

    shape = q.shape[:2]
    start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, v_cache.shape[-1])))
    inputs = k_cache.swapaxes(0, 1), v_cache.swapaxes(0, 1), jnp.arange(k_cache.shape[1])
    (_, total, y), _ = jax.lax.scan(key, start, inputs)
    return (y / jnp.where(total > 0, total, 1.0)[..., None],)
