"""Normalisation over the model width D. Statistics run in float32 whatever the input."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from arch.registry import NORMS
from arch.schema import PositiveFloat


@NORMS.register("layer")
class Layer(nnx.LayerNorm):
    """(x - mean) / sqrt(var + eps) * scale + bias. Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450."""

    def __init__(self, width: int, *, eps: PositiveFloat = 1e-6, bias: bool = True, rngs: nnx.Rngs):
        super().__init__(width, epsilon=eps, use_bias=bias, use_fast_variance=False, rngs=rngs)


@NORMS.register("rms")
class RMS(nnx.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * scale. Source: Zhang and Sennrich 2019, arXiv:1910.07467."""

    def __init__(self, width: int, *, eps: PositiveFloat = 1e-6, rngs: nnx.Rngs):
        super().__init__(width, epsilon=eps, rngs=rngs)


@NORMS.register("scale")
class Scale(nnx.Module):
    """g x / max(|x|_2, eps), one learnt scalar g, sqrt(D) at first.

    Source: Nguyen and Salazar 2019, arXiv:1910.05895.
    """

    def __init__(self, width: int, *, eps: PositiveFloat = 1e-5, rngs: nnx.Rngs):
        self.eps = eps
        self.gain = nnx.Param(jnp.full((), width**0.5))

    def __call__(self, x: Float[Array, "*A D"]) -> Float[Array, "*A D"]:
        square = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.maximum(square, self.eps**2))
        return (self.gain[...] * inverse * x).astype(x.dtype)
