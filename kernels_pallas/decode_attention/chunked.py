"""XLA form, split over the cache: a softmax a part, merged by the log-sum-exp of each; runs everywhere."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.precision import exact

SPLITS = 8  # at most; the largest power of two that divides S


def decode_attention_chunked(
    q: Float[Array, "B H K"],
    k_cache: Float[Array, "B S G K"],
    v_cache: Float[Array, "B S G V"],
    lengths: Int[Array, " B"],
    *,
    window: int | None,
    scale: float,
    splits: int | None = None,
) -> tuple[Float[Array, "B H V"]]:
    """(y,) of api.decode_attention. splits: a divisor of S."""
    batch, heads, _ = q.shape
    keys, groups = k_cache.shape[1:3]
    parts = splits or next(n for n in (SPLITS, SPLITS // 2, SPLITS // 4, 1) if keys % n == 0)
    q = q.reshape(batch, groups, heads // groups, -1)
    k, v = (a.reshape(batch, parts, keys // parts, *a.shape[2:]) for a in (k_cache, v_cache))
    scores = scale * _product("bgrk,bpsgk->bpgrs", q, k)
    seen = visible(lengths, keys, window).reshape(batch, parts, 1, 1, -1)
    scores = jnp.where(seen, scores, -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(scores, -1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(largest == -jnp.inf, 0.0, largest))
    total = weights.sum(-1)  # [B P G R]
    y = _product("bpgrs,bpsgv->bpgrv", weights.astype(v.dtype), v) / jnp.where(total > 0, total, 1.0)[..., None]
    lse = largest[..., 0] + jnp.log(jnp.where(total > 0, total, 1.0))
    return (merge(y, lse).reshape(batch, heads, -1).astype(v_cache.dtype),)


def _product(form, a, b):
    dtype = jnp.result_type(a, b)
    with exact(a, b):
        return jnp.einsum(form, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def visible(lengths: Int[Array, " B"], keys: int, window: int | None) -> Bool[Array, "B S"]:
    place = jnp.arange(keys)
    seen = place < lengths[:, None]
    return seen if window is None else seen & (place >= lengths[:, None] - window)


def merge(y: Float[Array, "B P *H V"], lse: Float[Array, "B P *H"]) -> Float[Array, "B *H V"]:
    """The softmax over all keys, of that over each part and the part's log sum_s exp(score_s), -inf if it is empty."""
    largest = jax.lax.stop_gradient(jnp.max(lse, axis=1, keepdims=True))
    share = jnp.exp(lse - jnp.where(largest == -jnp.inf, 0.0, largest))
    total = share.sum(axis=1)
    return (share[..., None] * y).sum(axis=1) / jnp.where(total > 0, total, 1.0)[..., None]
