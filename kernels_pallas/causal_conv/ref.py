"""Reference: one token at a time, float32. Never optimised."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def causal_conv_ref(
    x: Float[Array, "B T D"],
    filter: Float[Array, "W D"],
    bias: Float[Array, " D"] | None,
    past: Float[Array, "B P D"] | None,
    keep: Bool[Array, "B T"] | None,
    segment_ids: Int[Array, "B T"] | None,
    *,
    activation: Literal["silu"] | None,
) -> tuple[Float[Array, "B T D"]]:
    """(y,) of api.causal_conv: the W newest tokens and their segments are kept, the newest first."""
    batch, length, width = x.shape
    taps = filter.shape[0]
    keep = jnp.ones((batch, length), bool) if keep is None else keep
    segments = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids
    filter = filter.astype(jnp.float32)

    def token(carry, inputs):
        newest, where = carry  # [B W D], [B W]
        x_t, keep_t, segment_t = inputs
        x_t = jnp.where(keep_t[:, None], x_t, 0).astype(jnp.float32)
        newest = jnp.concatenate([x_t[:, None], newest[:, :-1]], axis=1)
        where = jnp.concatenate([segment_t[:, None], where[:, :-1]], axis=1)
        seen = jnp.where((where == segment_t[:, None])[..., None], newest, 0)
        y = (filter * seen).sum(axis=1)
        if bias is not None:
            y = y + bias.astype(jnp.float32)
        return (newest, where), jax.nn.silu(y) if activation == "silu" else y

    newest = jnp.zeros((batch, taps, width), jnp.float32)
    if past is not None:
        newest = newest.at[:, : taps - 1].set(past[:, ::-1].astype(jnp.float32))
    start = newest, jnp.broadcast_to(segments[:, :1], (batch, taps))
    y = jax.lax.scan(token, start, tuple(a.swapaxes(0, 1) for a in (x, keep, segments)))[1]
    return (y.swapaxes(0, 1),)
