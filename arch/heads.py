"""Heads: from token vectors to logits."""

from typing import Annotated, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from arch.layers import Dropout, dense
from arch.norms import Layer
from arch.registry import HEADS
from arch.schema import Positive, PositiveFloat, Range, Rate


def mean(x: Float[Array, "B T D"], keep: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """Over the tokens that are kept, in float32."""
    count = jnp.maximum(keep.sum(axis=1, keepdims=True), 1)
    return (jnp.einsum("btd,bt->bd", x.astype(jnp.float32), keep.astype(jnp.float32)) / count).astype(x.dtype)


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
            pooled = mean(x, keep)
        else:
            position = jnp.arange(keep.shape[1])
            last = jnp.max(jnp.where(keep, position, 0), axis=1)
            pooled = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        if self.hidden is not None:
            pooled = nnx.relu(self.hidden(pooled))
        return self.out(pooled).astype(jnp.float32)


@HEADS.register("metaformer")
class MetaFormerHead(nnx.Module):
    """Dense(classes) of z = LayerNorm(mean over tokens); with `ratio` of LayerNorm(relu(Dense(ratio D)(z))^2).

    Source: Yu et al. 2022, arXiv:2210.13452; the second form is that of ConvFormer and CAFormer, after MetaFormer
    blocks without a last norm. Their code gives the inner norm an eps of 1e-5; timm, followed here, 1e-6 to both.
    """

    causal: bool | None = False
    pooling = "mean"

    def __init__(
        self,
        width: int,
        *,
        num_classes: int,
        ratio: PositiveFloat | None = None,
        dropout: Rate = 0.0,  # before the last layer
        rngs: nnx.Rngs,
    ):
        inner = width if ratio is None else round(ratio * width)
        self.norm = Layer(width, rngs=rngs)
        self.hidden = None if ratio is None else dense(width, inner, bias=True, rngs=rngs)
        self.hidden_norm = None if ratio is None else Layer(inner, rngs=rngs)
        self.dropout = Dropout(dropout, rngs=rngs)
        self.out = dense(inner, num_classes, bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], keep: Bool[Array, "B T"]) -> Float[Array, "B C"]:
        """Logits in float32."""
        z = self.norm(mean(x, keep))
        if self.hidden is not None and self.hidden_norm is not None:
            z = self.hidden_norm(jnp.square(nnx.relu(self.hidden(z))))
        return self.out(self.dropout(z)).astype(jnp.float32)


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


@HEADS.register("matching")
class Matching(nnx.Module):
    """Do two inputs belong together? Each is pooled to a vector, a and b; then two hidden layers over both.

        z = [a, b] or, with features "nli", [a, b, a * b, a - b]
        logits = Dense(classes)(relu(Dense(hidden / 2)(relu(Dense(hidden)(z)))))

    Source: the dual encoder of the Long Range Arena release (Tay et al. 2020, arXiv:2011.04006), which pools without a
    CLS token and so takes the vector of the first byte: pooling "first". "cls" and "mean" are as in the classifier.
    Its paper describes the features "nli"; the release leaves them off.
    """

    causal: bool | None = False
    pairs = True  # an example is two inputs

    def __init__(
        self,
        width: int,
        *,
        num_classes: int,
        hidden: Annotated[int, Range(low=2)] = 512,
        pooling: Literal["cls", "mean", "first"] = "cls",
        features: Literal["concat", "nli"] = "concat",
        rngs: nnx.Rngs,
    ):
        self.pooling, self.features = pooling, features
        self.hidden = dense(width * (2 if features == "concat" else 4), hidden, bias=True, rngs=rngs)
        self.second = dense(hidden, hidden // 2, bias=True, rngs=rngs)
        self.out = dense(hidden // 2, num_classes, bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "B 2 T D"], keep: Bool[Array, "B 2 T"]) -> Float[Array, "B C"]:
        """Logits in float32."""
        a, b = (mean(x[:, i], keep[:, i]) if self.pooling == "mean" else x[:, i, 0] for i in range(2))
        z = jnp.concatenate([a, b] if self.features == "concat" else [a, b, a * b, a - b], axis=-1)
        return self.out(nnx.relu(self.second(nnx.relu(self.hidden(z))))).astype(jnp.float32)
