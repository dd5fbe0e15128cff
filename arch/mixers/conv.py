"""Depthwise separable convolution, the mixer of ConvFormer. Source: Yu et al. 2022, arXiv:2210.13452."""

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arch.channel_mixers import hidden_width
from arch.depthwise_conv import DepthwiseConv
from arch.errors import ConfigError
from arch.layers import StarReLU, dense
from arch.mixers.contract import State
from arch.ops.grid import fill_axes
from arch.registry import MIXERS
from arch.schema import Positive, PositiveFloat
from arch.short_conv import ShortConv


@MIXERS.register("conv")
class Conv(nnx.Module):
    """y = W_2 depthwise(StarReLU(W_1 x)), the inverted bottleneck of MobileNetV2 (arXiv:1801.04381). O(T D size^n).

    W_1 widens by `ratio`; the convolution reaches `size` tokens along each of the n grid axes, centred or, over a
    sequence, ending at t (causal, which the paper does not have). No biases, no normalisation inside.
    """

    modes = ("causal", "bidirectional")
    axes = None
    packing = ("causal", "bidirectional")

    def __init__(
        self,
        width: int,
        *,
        causal: bool,
        size: Positive = 7,
        ratio: PositiveFloat = 2.0,
        grid_axes: Positive = 1,  # n, the axes of the kernel; an input with fewer is a grid of one row
        rngs: nnx.Rngs,
    ):
        if causal and grid_axes != 1:
            raise ConfigError("grid_axes", f"a causal convolution runs over one axis, not {grid_axes}; use 1")
        if not causal and size % 2 == 0:
            raise ConfigError("size", f"a centred window needs an odd size, got {size}; use {size + 1}")
        inner = hidden_width(width, ratio, None)
        self.causal, self.grid_axes = causal, grid_axes
        self.up = dense(width, inner, bias=False, rngs=rngs)
        self.activation = StarReLU()
        self.conv: ShortConv | DepthwiseConv = (
            ShortConv(inner, size=size, bias=False, rngs=rngs)
            if causal
            else DepthwiseConv(inner, axes=grid_axes, size=size, bias=False, rngs=rngs)
        )
        self.down = dense(inner, width, bias=False, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B *A D"],
        *,
        keep: Bool[Array, "B *A"] | None = None,
        segment_ids: Int[Array, "B *A"] | None = None,
    ) -> Float[Array, "B *A D"]:
        """Mixes along every grid axis. Padding reads as zeros, like what lies outside the grid."""
        if x.ndim - 2 > self.grid_axes:
            remedy = "flatten it" if self.causal else f"set it to {x.ndim - 2}"
            raise ConfigError("grid_axes", f"{self.grid_axes}, but the input has {x.ndim - 2} grid axes; {remedy}")
        h = fill_axes(self.activation(self.up(x)), self.grid_axes, channels=1)
        keep, segment_ids = (None if a is None else fill_axes(a, self.grid_axes) for a in (keep, segment_ids))
        h = self.conv(h, keep, segment_ids)
        return self.down(h.reshape(*x.shape[:-1], h.shape[-1]))

    def init_state(self, batch: int, max_length: int) -> State:
        assert isinstance(self.conv, ShortConv)
        return self.conv.init_state(batch)

    def step(self, x: Float[Array, "B D"], state: State) -> tuple[Float[Array, "B D"], State]:
        assert isinstance(self.conv, ShortConv)
        h, state = self.conv.step(self.activation(self.up(x)), state)
        return self.down(h), state
