"""The head of a diffusion: from the vectors of noisy patches to what is said of their pixels, knowing the time."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arch.embeddings import Patches
from arch.errors import ConfigError
from arch.layers import dense
from arch.registry import HEADS
from arch.schema import Positive
from arch.spec import ImageSpec, Spec


def unpatchify(pixels: Float[Array, "B P N"], *, rows: int, columns: int, size: int) -> Float[Array, "B Y X C"]:
    """The image whose patches, row by row, hold these pixels, each patch its own row by row: undoes Patches' cut."""
    x = pixels.reshape(pixels.shape[0], rows, columns, size, size, -1).swapaxes(2, 3)
    return x.reshape(pixels.shape[0], rows * size, columns * size, -1)


def sinusoids(time: Float[Array, " B"], features: int) -> Float[Array, "B F"]:
    """cos and sin of 1000 t w_i, w_i = 10000^(-2i / F): the positions of Vaswani et al. with t in thousandths."""
    half = features // 2
    frequency = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / half)
    angle = 1000.0 * time.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


@HEADS.register("denoiser")
class Denoiser(nnx.Module):
    """Pixels of a patch = W x + b, patches laid out as the image they were cut from; W and b are 0 at first.

    The network learns the time t of its input, 0 for clean data and 1 for noise, from the vector
    W2 silu(W1 sinusoids(t)), which is added to every token after the positions; with `conditional` a learnt vector of
    the class is added to it, that of "no class" for a negative label or none.

    Sources: Ho et al. 2020, arXiv:2006.11239, for the features of t; Peebles and Xie 2022, arXiv:2212.09748, for
    patches, the linear last layer that starts at 0, and the class dropped for guidance. Unlike theirs the vector comes
    in once, at the first layer, and modulates no norm: so any topology takes it.
    """

    causal: bool | None = False  # a patch is told by those on all its sides
    output = "image"

    def __init__(
        self,
        width: int,
        *,
        features: Positive = 256,  # of the time
        conditional: bool = False,
        num_classes: int,
        spec: Spec,
        embedding: nnx.Module,
        embedding_width: int,
        rngs: nnx.Rngs,
    ):
        if not isinstance(spec, ImageSpec):
            raise ConfigError("name", "denoiser makes images and this task has token inputs; use language_model")
        if not isinstance(embedding, Patches):
            raise ConfigError("name", "denoiser gives each patch its pixels back; set model.embedding.name=patches")
        if width != embedding_width:
            raise ConfigError("name", "denoiser needs a token a patch; choose a topology that keeps width and grid")
        if features % 2:
            raise ConfigError("features", f"{features} is odd; half of them are cosines, half sines")
        self.rows, self.columns, self.size = embedding.rows, embedding.columns, embedding.size
        self.features, self.num_classes = features, num_classes
        self.time_in = dense(features, width, bias=True, rngs=rngs)
        self.time_out = dense(width, width, bias=True, rngs=rngs)
        table = nnx.initializers.normal(0.02)
        self.labels = nnx.Param(table(rngs.params(), (num_classes + 1, width))) if conditional else None
        pixels = self.size * self.size * spec.channels
        zeros = nnx.initializers.zeros
        self.out = nnx.Linear(width, pixels, kernel_init=zeros, bias_init=zeros, rngs=rngs)

    def condition(self, time: Float[Array, " B"], label: Int[Array, " B"] | None = None) -> Float[Array, "B D"]:
        """The vector that every token of an example gets. label negative, or None: of no class."""
        x = sinusoids(time, self.features).astype(self.time_in.kernel.dtype)
        x = self.time_out(nnx.silu(self.time_in(x)))
        if self.labels is None:
            if label is not None:
                raise ConfigError("head.conditional", "False, so the denoiser takes no labels; set it to True")
            return x
        row = jnp.full(time.shape, -1) if label is None else label
        return x + jnp.take(self.labels[...], jnp.where(row < 0, self.num_classes, row), axis=0)

    def __call__(self, x: Float[Array, "B P D"], keep: Bool[Array, "B P"] | None = None) -> Float[Array, "B Y X C"]:
        """In float32."""
        if x.shape[1] != self.rows * self.columns:
            raise ConfigError(
                "head.name",
                f"denoiser got {x.shape[1]} tokens for {self.rows * self.columns} patches; "
                "choose a topology that keeps the grid",
            )
        return unpatchify(self.out(x).astype(jnp.float32), rows=self.rows, columns=self.columns, size=self.size)
