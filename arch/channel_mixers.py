"""Channel mixers: functions of one token's channels, the same for every token."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from arch.layers import Dropout, StarReLU, dense
from arch.registry import CHANNEL_MIXERS
from arch.schema import Positive, PositiveFloat

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": nnx.gelu,
    "gelu_erf": functools.partial(nnx.gelu, approximate=False),
    "relu": nnx.relu,
    "squared_relu": lambda x: jnp.square(nnx.relu(x)),  # So et al. 2021, arXiv:2109.08668
    "silu": nnx.silu,
}


def hidden_width(width: int, ratio: float, hidden: int | None) -> int:
    """`hidden` where it is given, else ratio x width to the nearest whole number."""
    return hidden if hidden is not None else max(1, round(ratio * width))


@CHANNEL_MIXERS.register("mlp")
class MLP(nnx.Module):
    """W_2 activation(W_1 x + b_1) + b_2, dropout on the hidden units.

    gelu is the tanh form, as in the LRA release, gelu_erf the exact one; star_relu has two learnt numbers.
    """

    def __init__(
        self,
        width: int,
        *,
        ratio: PositiveFloat = 4.0,
        hidden: Positive | None = None,  # overrides ratio
        activation: Literal["gelu", "gelu_erf", "relu", "squared_relu", "star_relu", "silu"] = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        inner = hidden_width(width, ratio, hidden)
        self.activation: StarReLU | str = StarReLU() if activation == "star_relu" else activation
        self.up = dense(width, inner, bias=bias, rngs=rngs)
        self.dropout = Dropout(dropout, rngs=rngs)
        self.down = dense(inner, width, bias=bias, rngs=rngs)

    def __call__(self, x: Float[Array, "*A D"]) -> Float[Array, "*A D"]:
        activate = ACTIVATIONS[self.activation] if isinstance(self.activation, str) else self.activation
        return self.down(self.dropout(activate(self.up(x))))


class GatedMLP(nnx.Module):
    """W_down (gate(W_gate x) * W_up x), no biases. Source: Shazeer 2020, arXiv:2002.05202.

    The default ratio 8/3 makes its three matrices the size of a plain MLP's two at ratio 4, as in the paper.
    """

    activation: str

    def __init__(
        self,
        width: int,
        *,
        ratio: PositiveFloat = 8 / 3,
        hidden: Positive | None = None,  # overrides ratio
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        inner = hidden_width(width, ratio, hidden)
        self.up = dense(width, inner, bias=False, rngs=rngs)
        self.gate = dense(width, inner, bias=False, rngs=rngs)
        self.dropout = Dropout(dropout, rngs=rngs)
        self.down = dense(inner, width, bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "*A D"]) -> Float[Array, "*A D"]:
        gate = ACTIVATIONS[self.activation](self.gate(x))
        return self.down(self.dropout(gate * self.up(x)))


@CHANNEL_MIXERS.register("swiglu")
class SwiGLU(GatedMLP):
    """GatedMLP with gate SiLU (Swish with beta 1)."""

    activation = "silu"


@CHANNEL_MIXERS.register("geglu")
class GEGLU(GatedMLP):
    """GatedMLP with gate GELU (tanh form)."""

    activation = "gelu"
