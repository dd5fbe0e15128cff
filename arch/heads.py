"""Heads: from token vectors to logits."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from arch.layers import dense
from arch.registry import HEADS
from arch.schema import Positive


@HEADS.register("classifier")
class Classifier(nnx.Module):
    """One vector a sequence, then Dense(hidden) + ReLU where `hidden` is given, then Dense(classes).

    pooling: "cls" takes a learnt token put before the input (zeros at first), "mean" the mean over tokens that are not
    padding, "last" the last such token. The hidden layer is that of the Long Range Arena release, whose mean, unlike
    ours, runs over padding too (Tay et al. 2020, arXiv:2011.04006).
    """

    causal: bool | None = None  # fits causal and bidirectional models

    def __init__(
        self,
        width: int,
        *,
        num_classes: int,
        pooling: Literal["cls", "mean", "last"] = "cls",
        hidden: Positive | None = None,
        rngs: nnx.Rngs,
    ):
        self.pooling = pooling
        self.hidden = None if hidden is None else dense(width, hidden, bias=True, rngs=rngs)
        self.out = dense(width if hidden is None else hidden, num_classes, bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], keep: Bool[Array, "B T"]) -> Float[Array, "B C"]:
        """Logits in float32."""
        if self.pooling == "cls":
            pooled = x[:, 0]
        elif self.pooling == "mean":
            count = jnp.maximum(keep.sum(axis=1, keepdims=True), 1)
            pooled = (jnp.einsum("btd,bt->bd", x.astype(jnp.float32), keep.astype(jnp.float32)) / count).astype(x.dtype)
        else:
            position = jnp.arange(keep.shape[1])
            last = jnp.max(jnp.where(keep, position, 0), axis=1)
            pooled = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        if self.hidden is not None:
            pooled = nnx.relu(self.hidden(pooled))
        return self.out(pooled).astype(jnp.float32)


@HEADS.register("language_model")
class LanguageModel(nnx.Module):
    """Logits of the next token at every position: one matrix without bias."""

    causal: bool | None = True  # a model that sees the future would copy its target
    pooling = None

    def __init__(self, width: int, *, num_classes: int, rngs: nnx.Rngs):
        self.out = dense(width, num_classes, bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], keep: Bool[Array, "B T"]) -> Float[Array, "B T C"]:
        """Logits in float32."""
        return self.out(x).astype(jnp.float32)
