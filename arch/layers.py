"""The few layers that mixers and topologies share, with the initialisation of the Long Range Arena release."""

import jax
from flax import nnx
from jax import nn

XAVIER = nn.initializers.xavier_uniform()
NEARLY_ZERO = nn.initializers.normal(1e-6)


def dense(inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
    """x W (+ b): Xavier-uniform kernel, bias N(0, 1e-6)."""
    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=XAVIER, bias_init=NEARLY_ZERO, rngs=rngs)


class Dropout(nnx.Module):
    """Zeroes a share `rate` of the elements and scales the rest by 1 / (1 - rate); identity when deterministic.

    With rate 0 it holds no random state, so that a model without dropout asks for no random numbers.
    """

    def __init__(self, rate: float, *, rngs: nnx.Rngs):
        self.inner = nnx.Dropout(rate, rngs=rngs) if rate else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return x if self.inner is None else self.inner(x)
