"""Tiles of queries against all keys, each recomputed in the backward pass; runs everywhere."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.attention.ref import attention_ref


def attention_chunked(
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
    """y, lse of api.attention."""
    run = functools.partial(attention_ref, window=window, block_mask=block_mask, scale=scale, activation=activation)
    return jax.checkpoint(run)(q, k, v, bias, keep, q_segments, k_segments)
