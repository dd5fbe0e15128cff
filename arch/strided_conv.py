"""Convolution with a stride: how a grid of pixels or tokens becomes a smaller one."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from arch.errors import ConfigError
from arch.layers import NEARLY_ZERO, XAVIER


class StridedConv(nnx.Module):
    """y_p = sum_o W_o x_{stride p + o - padding} + b, 0 <= o < size along every grid axis; outside the grid x is 0.

    A grid axis of n becomes one of (n + 2 padding - size) // stride + 1. The kernel [size ... C D] starts
    Xavier-uniform, the bias N(0, 1e-6).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        grid: tuple[int, ...],  # of the input
        size: int,
        stride: int,
        padding: int,
        option: str = "",  # what the config's names of size and stride begin with
        rngs: nnx.Rngs,
    ):
        if min(grid) < stride:
            raise ConfigError(
                f"{option}stride", f"{stride} cannot shrink a grid of {grid}; use larger images or smaller strides"
            )
        if min(grid) + 2 * padding < size:
            raise ConfigError(
                f"{option}size",
                f"a kernel of {size} does not fit a grid of {grid} with {padding} of padding; use larger images",
            )
        self.grid = tuple((n + 2 * padding - size) // stride + 1 for n in grid)
        self.stride, self.padding = stride, padding
        self.kernel = nnx.Param(XAVIER(rngs.params(), (size,) * len(grid) + (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(NEARLY_ZERO(rngs.params(), (outputs,), jnp.float32))

    def __call__(self, x: Float[Array, "B *A C"]) -> Float[Array, "B *P D"]:
        axes = len(self.grid)
        places = "".join(chr(ord("0") + i) for i in range(axes))
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            window_strides=(self.stride,) * axes,
            padding=((self.padding, self.padding),) * axes,
            dimension_numbers=(f"N{places}C", f"{places}IO", f"N{places}C"),
        )
        return y + self.bias[...].astype(y.dtype)
