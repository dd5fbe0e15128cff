"""The matrix's two tasks: so small that a model of any kind lowers its loss within 20 steps.

Held in memory, drawn from a seed. Their names are no task of a normal run: importing this module registers them.
"""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from arch.registry import TASKS
from arch.spec import ImageSpec, InputSpec, Spec
from experiments.data.task import Example

CLASSES, LENGTH, SIDE = 3, 16, 8
SPLITS = {"train": 256, "validation": 32, "test": 32}


@dataclass(frozen=True)
class Rows:
    """A Source: inputs [N ...] and labels [N]."""

    inputs: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return {"inputs": self.inputs[index], "label": np.int32(self.labels[index])}


class Drawn:
    """What the two have in common: a split is drawn from the stream of its number."""

    metric, token_labels = "accuracy", False
    chance: float
    spec: Spec

    def __init__(self) -> None:
        self.splits: Mapping[str, int] = SPLITS

    def _draw(self, random: np.random.Generator, size: int) -> Rows:
        raise NotImplementedError

    @functools.cached_property
    def _sources(self) -> dict[str, Rows]:
        return {name: self._draw(np.random.default_rng(i), size) for i, (name, size) in enumerate(SPLITS.items())}

    @functools.cached_property
    def content_hash(self) -> str:
        digest = hashlib.sha256()
        for rows in self._sources.values():
            digest.update(np.ascontiguousarray(rows.inputs).tobytes() + rows.labels.astype("<i4").tobytes())
        return digest.hexdigest()

    def prepare(self) -> None:
        pass

    def source(self, split: str) -> Any:
        return self._sources[split]

    def majority(self, split: str) -> float:
        labels = self._sources[split].labels
        return float(np.bincount(labels).max() / len(labels))


@TASKS.register("matrix_tokens")
class Tokens(Drawn):
    """Which of the tokens 1, 2, 3 is the most frequent among up to 16; the last few are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = InputSpec(vocab_size=CLASSES + 2, num_classes=CLASSES, length=LENGTH)
        self.chance = 1 / CLASSES

    def _draw(self, random: np.random.Generator, size: int) -> Rows:
        labels = random.integers(0, CLASSES, size)
        tokens = np.where(
            random.random((size, LENGTH)) < 0.6, labels[:, None] + 1, random.integers(1, 5, (size, LENGTH))
        )
        tokens[np.arange(LENGTH) >= LENGTH - random.integers(0, 4, (size, 1))] = 0
        return Rows(tokens.astype(np.uint8), labels)


@TASKS.register("matrix_images")
class Images(Drawn):
    """Bright or dark, 8 x 8 grey pixels under noise."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = ImageSpec(height=SIDE, width=SIDE, channels=1, num_classes=2)
        self.chance = 0.5

    def _draw(self, random: np.random.Generator, size: int) -> Rows:
        labels = random.integers(0, 2, size)
        noise = random.normal(size=(size, SIDE, SIDE, 1))
        return Rows((noise + (2 * labels - 1)[:, None, None, None]).astype(np.float32), labels)
