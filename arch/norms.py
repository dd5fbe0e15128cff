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


@NORMS.register("group")
class Group(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias, mean and variance over all tokens and channels of an example.

    Group normalisation with one group. Source: Wu and He 2018, arXiv:1803.08494, as in PoolFormer, arXiv:2111.11418.
    Tokens see each other in it, padding too: for the grids of images only, where every token is real.
    """

    def __init__(self, width: int, *, eps: PositiveFloat = 1e-5, bias: bool = True):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,))) if bias else None

    def __call__(self, x: Float[Array, "B *A D"]) -> Float[Array, "B *A D"]:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=range(1, x.ndim), keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=range(1, x.ndim), keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps) * self.scale[...].astype(jnp.float32)
        return (y if self.bias is None else y + self.bias[...].astype(jnp.float32)).astype(x.dtype)


@NORMS.register("none")
class NoNorm(nnx.Module):
    """y = x."""

    def __init__(self, width: int):
        del width

    def __call__(self, x: Float[Array, "*A D"]) -> Float[Array, "*A D"]:
        return x


class HeadNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis of [... H V], every head by itself, scale [H V].

    RetNet's group norm without a mean (Sun et al. 2023, arXiv:2307.08621), after the heads of a linear attention.
    Not an entry of NORMS: it wants heads.
    """

    def __init__(self, heads: int, head_dim: int, *, eps: float = 1e-5, scale: bool = True, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((heads, head_dim))) if scale else None

    def __call__(self, x: Float[Array, "*A H V"]) -> Float[Array, "*A H V"]:
        wide = x.astype(jnp.float32)
        y = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (y if self.scale is None else y * self.scale[...].astype(jnp.float32)).astype(x.dtype)
