"""Linear attention without an order. Source: Katharopoulos et al. 2020, arXiv:2006.16236, equation 6."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def global_linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H V"],
    keep: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B T H V"]:
    """y_t = (sum_s k_s v_s^T)^T q_t / (q_t . sum_s k_s): every query sees every kept key. O(T K V) a head.

    q and k come after the feature map, which must be positive (or the divisor may vanish). keep is False on padding
    keys. With no kept key, or q_t = 0, y_t is 0. Sums run in float32; y has the dtype of v.
    """
    if keep is not None:
        k = jnp.where(keep[:, :, None, None], k, 0)
    out = v.dtype
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))  # XLA's CPU cannot run every product of bf16 into float32
    y = jnp.einsum("bthk,bhkv->bthv", q, jnp.einsum("bshk,bshv->bhkv", k, v))
    total = jnp.einsum("bthk,bhk->bth", q, k.sum(1))[..., None]
    return jnp.where(total == 0, 0.0, y / jnp.where(total == 0, 1.0, total)).astype(out)
