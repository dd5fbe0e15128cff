"""Short causal convolution: the public function, its checks and the choice of implementation."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.causal_conv.chunked import causal_conv_chunked
from kernels_pallas.causal_conv.pallas_tpu import causal_conv_tpu
from kernels_pallas.causal_conv.ref import causal_conv_ref
from kernels_pallas.sharded import Axes

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "ref": causal_conv_ref,
    "chunked": causal_conv_chunked,
    "pallas_tpu": causal_conv_tpu,
}
AUTO = {"tpu": ("pallas_tpu", "chunked"), "default": ("chunked",)}  # in order of preference
AXES = Axes(ins=("B.H", ".H", "H", "B.H", "B.", "B."), outs=("B.H",))


def causal_conv(
    x: Float[Array, "B T D"],
    filter: Float[Array, "W D"],
    bias: Float[Array, " D"] | None = None,
    past: Float[Array, "B P D"] | None = None,
    *,
    keep: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    activation: Literal["silu"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B P D"]]:
    """y_t = f(bias + sum_{i < W} filter_i x_{t-i}), every channel by itself; f is SiLU or nothing. O(T W D).

    Source: the convolution of Mamba (Gu and Dao 2023, arXiv:2312.00752) and, without a bias, of DeltaNet (Yang et al.
    2024, arXiv:2406.06484). Here the filter has its newest token first; theirs has it last.

    Args:
      x: the sequence, any float dtype.
      filter: W >= 1 taps, the first for the token itself.
      past: the P = W - 1 tokens before x, the oldest first; zeros if None. They are of the first token's segment.
      keep: False on padding, which reads as zeros; its own output means nothing.
      segment_ids: of packed sequences; tokens of other segments read as zeros.
      implementation: a key of IMPLEMENTATIONS; None takes the first in AUTO that does not refuse.

    Returns:
      y in the dtype of x, and the last W - 1 tokens of the last segment, the `past` of what follows, in the dtype of
      past or else of x. Sums run in float32 whatever the inputs.

    Raises:
      ValueError: shapes that do not fit. KeyError: unknown implementation.
      NotImplementedError: refused; the message gives the reason.
    """
    batch, length, width = x.shape
    taps = filter.shape[0]
    if taps < 1 or filter.shape[1] != width:
        raise ValueError(f"causal_conv: filter {filter.shape} must be [W D], W >= 1, for x {x.shape}")
    if past is not None and past.shape != (batch, taps - 1, width):
        raise ValueError(f"causal_conv: past {past.shape} must be [B W-1 D] = {(batch, taps - 1, width)}")
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"causal_conv: bias {bias.shape} must be {(width,)}")
    for name, marks in (("keep", keep), ("segment_ids", segment_ids)):
        if marks is not None and marks.shape != (batch, length):
            raise ValueError(f"causal_conv: {name} {marks.shape} must be [B T] = {(batch, length)}")
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv: activation must be 'silu' or None, got {activation!r}")
    after = _after(x, taps, past, keep, segment_ids)
    if 0 in x.shape:
        dispatch.check("causal_conv", IMPLEMENTATIONS, implementation)
        return x, after
    with jax.named_scope("causal_conv"):
        (y,) = dispatch.call(
            "causal_conv",
            IMPLEMENTATIONS,
            implementation,
            AUTO,
            *(x, filter, bias, None if taps == 1 else past, keep, segment_ids),
            axes=AXES,
            dtypes=(x.dtype,),
            activation=activation,
        )
    return y, after


def _after(x: Array, taps: int, past: Array | None, keep: Array | None, segment_ids: Array | None) -> Array:
    """The last taps - 1 tokens. Made outside of the implementations: no gradient passes here that nobody asked for."""
    batch, length, width = x.shape
    new = min(taps - 1, length)
    x = x[:, length - new :]
    if keep is not None:
        x = jnp.where(keep[:, length - new :, None], x, 0)
    if past is None:
        past = jnp.zeros((batch, taps - 1, width), x.dtype)
    old = past[:, new:]
    if segment_ids is not None and length:
        last = segment_ids[:, -1:]
        x = jnp.where((segment_ids[:, length - new :] == last)[..., None], x, 0)
        old = jnp.where((segment_ids[:, :1] == last)[..., None], old, 0)
    return jnp.concatenate([old, x.astype(past.dtype)], axis=1)
