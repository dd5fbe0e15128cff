"""Reference: the whole score matrix at once, float32. Never optimised."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def visible(
    queries: int,
    keys: int,
    keep: Bool[Array, "B S"] | None,
    q_segments: Int[Array, "B T"] | None,
    k_segments: Int[Array, "B S"] | None,
    window: tuple[int | None, int | None],
    block_mask: Bool[np.ndarray, "J M N"] | None,
) -> Bool[Array, "#B #H T S"]:
    """True where a query may see a key; the contract is in api.attention."""
    offset = jnp.arange(keys)[None, :] - (jnp.arange(queries)[:, None] + keys - queries)  # [T S], s - position of t
    left, right = window
    mask = jnp.ones((1, 1, queries, keys), bool)
    if left is not None:
        mask &= offset >= -left
    if right is not None:
        mask &= offset <= right
    if block_mask is not None:
        rows, columns = block_mask.shape[1:]
        mask &= jnp.asarray(block_mask.repeat(queries // rows, 1).repeat(keys // columns, 2))[None]
    if keep is not None:
        mask &= keep[:, None, None, :]
    if q_segments is not None and k_segments is not None:
        mask &= (q_segments[:, :, None] == k_segments[:, None, :])[:, None]
    return mask


def attention_ref(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    bias: Float[Array, "#B #H #T #S"] | None,
    keep: Bool[Array, "B S"] | None,
    q_segments: Int[Array, "B T"] | None,
    k_segments: Int[Array, "B S"] | None,
    *,
    window: tuple[int | None, int | None],
    block_mask: Bool[np.ndarray, "J M N"] | None,
    scale: float,
    activation: str,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"] | None]:
    """y, lse of api.attention. Memory O(B H T S)."""
    dtype, repeats = v.dtype, q.shape[2] // k.shape[2]
    q, k, v = (x.astype(jnp.float32) for x in (q, k.repeat(repeats, 2), v.repeat(repeats, 2)))
    scores = scale * jnp.einsum("bthk,bshk->bhts", q, k, precision="highest")
    if bias is not None:
        scores += bias.astype(jnp.float32)
    mask = visible(q.shape[1], k.shape[1], keep, q_segments, k_segments, window, block_mask)
    scores = jnp.where(mask, scores, -jnp.inf)
    if activation == "sigmoid":
        weights, lse = jnp.where(mask, jax.nn.sigmoid(jnp.where(mask, scores, 0.0)), 0.0), None
    else:
        highest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
        highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
        weights = jnp.exp(scores - highest)  # 0 where not visible
        total = weights.sum(-1, keepdims=True)
        nonzero = jnp.where(total == 0, 1.0, total)  # a query without a visible key: y = 0 and no gradient
        weights = weights / nonzero
        lse = jnp.where(total == 0, -jnp.inf, jnp.log(nonzero) + highest)[..., 0].swapaxes(1, 2)
    y = jnp.einsum("bhts,bshv->bthv", weights, v, precision="highest")
    return y.astype(dtype), lse
