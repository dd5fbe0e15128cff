"""What a network is trained for, the config's section `objective`: classes and tokens, or to take noise away.

An objective turns a batch and a network into sums over the batch. The trainer divides them by the last, which is the
weight, and calls the means by the objective's `metrics`. `classify` is here, the diffusions are in a file of their own.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp

from arch.errors import ConfigError, within
from arch.registry import HEADS, OBJECTIVES
from arch.schema import Rate, names_of

Batch = Mapping[str, Any]
Predict = Callable[..., jax.Array]  # (inputs, keep, key, **conditions) -> the head's output; key None: no dropout
Sums = tuple[jax.Array, ...]  # of each metric, then the weight; float32


class Objective(Protocol):
    """Registered in arch.registry.OBJECTIVES under its config name."""

    output: ClassVar[Literal["logits", "image"]]  # what the head must give
    metrics: ClassVar[tuple[str, ...]]  # "loss" first
    judged_by: ClassVar[str]  # the metric that `rank` looks at
    draws: ClassVar[bool]  # needs random numbers in evaluation too: its batches then carry "index", int32 [B]

    def __call__(self, predict: Predict, batch: Batch, key: jax.Array | None) -> Sums:
        """key None: evaluation, deterministic; all randomness then comes from the examples' indices."""
        ...

    def rank(self, scores: Mapping[str, float]) -> float:
        """The higher, the better the checkpoint."""
        ...


def score(logits: jax.Array, batch: Batch, smoothing: float = 0.0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over a batch of loss, correct answers and weight, in float32.

    Loss of one answer y: -(1 - s) log p_y - s mean_c log p_c, s the label smoothing.
    """
    target, weight = batch["label"], batch["weight"]
    if logits.ndim == 3 and target.ndim == 2:
        weight, target = weight[:, None] * (target >= 0), jnp.maximum(target, 0)
    elif logits.ndim == 3:
        logits, target = logits[:, :-1], batch["inputs"][:, 1:]
        weight = weight[:, None] * batch["keep"][:, 1:]
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    loss = -jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing * log_p.mean(axis=-1)
    correct = (logits.argmax(axis=-1) == target).astype(jnp.float32)
    return (loss * weight).sum(), (correct * weight).sum(), weight.sum()


@OBJECTIVES.register("classify")
class Classify:
    """Cross-entropy with the label, of an example or of its tokens, or with the next token; see `score`."""

    output: ClassVar[Literal["logits", "image"]] = "logits"
    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    judged_by: ClassVar[str] = "accuracy"
    draws: ClassVar[bool] = False

    def __init__(self, *, smoothing: Rate = 0.0):
        self.smoothing = smoothing

    def __call__(self, predict: Predict, batch: Batch, key: jax.Array | None) -> Sums:
        """The label smoothing is of training alone."""
        logits = predict(batch["inputs"], batch.get("keep"), key)
        return score(logits, batch, 0.0 if key is None else self.smoothing)

    def rank(self, scores: Mapping[str, float]) -> float:
        return scores["accuracy"]


def build(config: Mapping[str, Any]) -> Objective:
    """The objective of a resolved config; refuses one that its head or its training does not fit."""
    section, head, smoothing = config["objective"], config["model"]["head"], config["train"]["label_smoothing"]
    name, output = section["name"], getattr(HEADS[head["name"]], "output", "logits")
    if smoothing and "smoothing" not in names_of(OBJECTIVES[name]):
        raise ConfigError("train.label_smoothing", f"{name} has no labels to smooth; use 0")
    with within("objective"):
        found = OBJECTIVES.build(section, smoothing=smoothing, conditional=head.get("conditional", False))
    if found.output != output:
        fits = [head for head in HEADS.names() if getattr(HEADS[head], "output", "logits") == found.output]
        raise ConfigError(
            "model.head.name",
            f"{head['name']} gives {output} and the objective {name} needs {found.output}; use {' or '.join(fits)}",
        )
    return found
