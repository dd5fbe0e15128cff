"""Channel mixers: functions of one token's channels, the same for every token."""

from typing import Literal

import jax
from flax import nnx
from jaxtyping import Array, Float

from arch.layers import Dropout, dense
from arch.registry import CHANNEL_MIXERS
from arch.schema import Positive, PositiveFloat

ACTIVATIONS = {"gelu": nnx.gelu, "relu": nnx.relu, "silu": nnx.silu}


def hidden_width(width: int, ratio: float, hidden: int | None) -> int:
    """`hidden` where it is given, else ratio x width to the nearest whole number."""
    return hidden if hidden is not None else max(1, round(ratio * width))


@CHANNEL_MIXERS.register("mlp")
class MLP(nnx.Module):
    """W_2 activation(W_1 x + b_1) + b_2, dropout on the hidden units. GELU is the tanh form, as in the LRA release."""

    def __init__(
        self,
        width: int,
        *,
        ratio: PositiveFloat = 4.0,
        hidden: Positive | None = None,  # overrides ratio
        activation: Literal["gelu", "relu", "silu"] = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        inner = hidden_width(width, ratio, hidden)
        self.activation = activation
        self.up = dense(width, inner, bias=bias, rngs=rngs)
        self.dropout = Dropout(dropout, rngs=rngs)
        self.down = dense(inner, width, bias=bias, rngs=rngs)

    def __call__(self, x: Float[Array, "*A D"]) -> Float[Array, "*A D"]:
        return self.down(self.dropout(ACTIVATIONS[self.activation](self.up(x))))


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
        gate: jax.Array = ACTIVATIONS[self.activation](self.gate(x))
        return self.down(self.dropout(gate * self.up(x)))


@CHANNEL_MIXERS.register("swiglu")
class SwiGLU(GatedMLP):
    """GatedMLP with gate SiLU (Swish with beta 1)."""

    activation = "silu"


@CHANNEL_MIXERS.register("geglu")
class GEGLU(GatedMLP):
    """GatedMLP with gate GELU (tanh form)."""

    activation = "gelu"
