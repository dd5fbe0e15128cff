"""Position encodings. An absolute one is added to the embeddings; rotary turns queries and keys inside the mixers."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from arch.registry import POSITIONS
from arch.schema import PositiveFloat


@POSITIONS.register("none")
class NoPositions(nnx.Module):
    """Nothing is added; order reaches the model only through its mixers."""

    rotary = False

    def __init__(self, width: int):
        del width

    def __call__(self, x: Float[Array, "B T D"], start: int | Int[Array, ""] = 0) -> Float[Array, "B T D"]:
        """x plus the encodings of positions start, start + 1, ..."""
        return x


@POSITIONS.register("sinusoid")
class Sinusoid(nnx.Module):
    """p[t, 2i] = sin(t w_i), p[t, 2i + 1] = cos(t w_i), w_i = base^(-2i / D).

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """

    rotary = False

    def __init__(self, width: int, *, base: PositiveFloat = 10_000.0):
        self.width, self.base = width, base

    def __call__(self, x: Float[Array, "B T D"], start: int | Int[Array, ""] = 0) -> Float[Array, "B T D"]:
        t = (start + jnp.arange(x.shape[1])).astype(jnp.float32)
        channel = jnp.arange(self.width)
        frequency = jnp.exp(-jnp.log(self.base) * (channel // 2 * 2) / self.width)
        phase = jnp.where(channel % 2, jnp.pi / 2, 0.0)  # cos x = sin(x + pi / 2)
        return x + jnp.sin(t[:, None] * frequency + phase).astype(x.dtype)


@POSITIONS.register("learned")
class Learned(nnx.Module):
    """A learnt vector a position, N(0, 0.02) at first.

    Source: the Long Range Arena release, Tay et al. 2020, arXiv:2011.04006.
    """

    rotary = False

    def __init__(self, width: int, *, max_length: int, stddev: PositiveFloat = 0.02, rngs: nnx.Rngs):
        self.table = nnx.Param(nnx.initializers.normal(stddev)(rngs.params(), (max_length, width)))

    def __call__(self, x: Float[Array, "B T D"], start: int | Int[Array, ""] = 0) -> Float[Array, "B T D"]:
        return x + jnp.take(self.table[...], start + jnp.arange(x.shape[1]), axis=0).astype(x.dtype)


@POSITIONS.register("rotary")
class Rotary(NoPositions):
    """Turns each pair (x_i, x_{i + K/2}) of a query or key by the angle t base^(-2i / K); nothing is added.

    Scores then depend on the distance of query and key alone. An odd last channel is left as it is.
    Source: Su et al. 2021, arXiv:2104.09864; pairs are halves apart, as in GPT-NeoX, not neighbours as in the paper.
    """

    rotary = True

    def __init__(self, width: int, *, base: PositiveFloat = 10_000.0):
        del width
        self.base = base

    def rotate(self, x: Float[Array, "B T H K"], start: int | Int[Array, ""] = 0) -> Float[Array, "B T H K"]:
        half = x.shape[-1] // 2
        frequency = jnp.exp(-jnp.log(self.base) * jnp.arange(half) / max(half, 1))
        t = (start + jnp.arange(x.shape[1])).astype(jnp.float32)
        angle = t[:, None, None] * frequency  # [T 1 K/2]
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        a, b, rest = (
            x[..., part].astype(jnp.float32) for part in (slice(half), slice(half, 2 * half), slice(2 * half, None))
        )
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)
