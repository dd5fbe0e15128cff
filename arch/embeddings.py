"""Input embeddings: from what a task gives, token ids or pixels, to vectors on the token grid."""

from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Annotated

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from arch.errors import ConfigError
from arch.layers import dense
from arch.registry import EMBEDDINGS, NORMS, Choice
from arch.schema import NonNegative, Positive
from arch.spec import ImageSpec, InputSpec, Spec
from arch.strided_conv import StridedConv

NONE = MappingProxyType({"name": "none"})


def require_image(spec: Spec, name: str) -> ImageSpec:
    if not isinstance(spec, ImageSpec):
        raise ConfigError("name", f"{name} cuts images and this task has token inputs; use tokens")
    return spec


@EMBEDDINGS.register("tokens")
class Tokens(nnx.Module):
    """A learnt vector an id, N(0, 1) at first."""

    def __init__(self, *, spec: Spec, width: int, rngs: nnx.Rngs):
        if not isinstance(spec, InputSpec):
            raise ConfigError("name", "tokens looks ids up and this task has images; use patches")
        self.grid = (spec.length,)
        self.embedding = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (spec.vocab_size, width)))

    def __call__(self, inputs: Int[Array, "*A"]) -> Float[Array, "*A D"]:
        return jnp.take(self.embedding[...], inputs, axis=0)


@EMBEDDINGS.register("patches")
class Patches(nnx.Module):
    """x_p = W vec(pixels of patch p) + b, patches of size x size pixels side by side.

    flatten lays the grid of patches out as a sequence, row by row, which a CLS token and positions of sequences
    need. Source: Dosovitskiy et al. 2020, arXiv:2010.11929. A size of 1 makes every pixel a token.
    """

    def __init__(
        self,
        *,
        size: Positive,  # pixels along each side
        flatten: bool = False,
        spec: Spec,
        width: int,
        rngs: nnx.Rngs,
    ):
        image = require_image(spec, "patches")
        for what, pixels in (("height", image.height), ("width", image.width)):
            if pixels % size:
                raise ConfigError("size", f"{size} does not divide the image's {what} of {pixels} pixels")
        self.size = size
        self.rows, self.columns = image.height // size, image.width // size
        self.grid = (self.rows * self.columns,) if flatten else (self.rows, self.columns)
        self.proj = dense(size * size * image.channels, width, bias=True, rngs=rngs)

    def __call__(self, inputs: Float[Array, "B Y X C"]) -> Float[Array, "B *A D"]:
        batch, _, _, channels = inputs.shape
        x = inputs.reshape(batch, self.rows, self.size, self.columns, self.size, channels).swapaxes(2, 3)
        x = x.reshape(batch, *self.grid, self.size * self.size * channels)
        return self.proj(x.astype(self.proj.kernel.dtype))


@EMBEDDINGS.register("stem")
class Stem(nnx.Module):
    """norm(conv(pixels)), a convolution whose kernel overlaps: 7 x 7 with stride 4, so that 224 pixels give 56 tokens.

    The first layer of PoolFormer (Yu et al. 2022, arXiv:2111.11418), which has no norm there; the MetaFormer baselines
    (arXiv:2210.13452) have a layer norm.
    """

    def __init__(
        self,
        *,
        size: Positive = 7,
        stride: Positive = 4,
        padding: NonNegative = 2,
        norm: Annotated[Mapping, Choice((NORMS,))] = NONE,
        spec: Spec,
        width: int,
        rngs: nnx.Rngs,
    ):
        image = require_image(spec, "stem")
        grid = (image.height, image.width)
        self.conv = StridedConv(image.channels, width, grid=grid, size=size, stride=stride, padding=padding, rngs=rngs)
        self.norm = NORMS.build(norm, path="norm", width=width, rngs=rngs)
        self.grid = self.conv.grid

    def __call__(self, inputs: Float[Array, "B Y X C"]) -> Float[Array, "B *A D"]:
        return self.norm(self.conv(inputs.astype(self.conv.kernel.dtype)))


def tokens_of(grid: tuple[int, ...]) -> int:
    """Tokens in all."""
    return prod(grid)
