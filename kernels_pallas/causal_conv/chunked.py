"""XLA form: one shifted copy of the sequence a tap, which the compiler fuses into one pass; runs everywhere."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def causal_conv_chunked(
    x: Float[Array, "B T D"],
    filter: Float[Array, "W D"],
    bias: Float[Array, " D"] | None,
    past: Float[Array, "B P D"] | None,
    keep: Bool[Array, "B T"] | None,
    segment_ids: Int[Array, "B T"] | None,
    *,
    activation: Literal["silu"] | None,
) -> tuple[Float[Array, "B T D"]]:
    """(y,) of api.causal_conv. Saved for the backward pass: the inputs."""
    seen = visible(keep, segment_ids, filter.shape[0])
    return (jax.checkpoint(functools.partial(convolve, activation=activation))(x, filter, bias, past, seen),)


def visible(
    keep: Bool[Array, "B T"] | None, segment_ids: Int[Array, "B T"] | None, taps: int
) -> list[Bool[Array, "B T"]] | None:
    """A mask a tap i: True where token t - i is read, by padding and packing. None if nothing is hidden.

    What lies before the row counts as of its first segment.
    """
    if keep is None and segment_ids is None:
        return None
    masks = []
    for i in range(taps):
        read: Array | None = None
        if keep is not None:
            read = _earlier(keep, i, True)
        if segment_ids is not None and (i or keep is None):
            first = segment_ids[:, :1]
            same = _earlier(segment_ids, i, first) == segment_ids
            read = same if read is None else read & same
        assert read is not None
        masks.append(read)
    return masks


def _earlier(x: Array, distance: int, before: Array | bool) -> Array:
    """x_{t - distance} [B T], `before` [B 1] where there is no such token."""
    start = jnp.broadcast_to(jnp.asarray(before, x.dtype), (x.shape[0], distance))
    return jnp.concatenate([start, x], axis=1)[:, : x.shape[1]]


def convolve(x, filter, bias, past, seen, *, activation):
    """y in the dtype of x; seen as from `visible`."""
    taps, length = filter.shape[0], x.shape[1]
    filter = filter.astype(jnp.float32)
    if past is None:
        row = jnp.pad(x, [(0, 0), (taps - 1, 0), (0, 0)])
    else:
        row = jnp.concatenate([past.astype(jnp.result_type(past, x)), x], axis=1)

    def term(i: int) -> Array:
        earlier = row[:, taps - 1 - i : taps - 1 - i + length]
        if seen is not None:
            earlier = jnp.where(seen[i][..., None], earlier, 0)
        return earlier.astype(jnp.float32) * filter[i]

    total = term(0)
    for i in range(1, taps):
        total = total + term(i)
    if bias is not None:
        total = total + bias.astype(jnp.float32)
    return (jax.nn.silu(total) if activation == "silu" else total).astype(x.dtype)
