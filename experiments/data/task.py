"""What every task shares: the contract with the trainer, and examples of tokens held in memory."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np

from arch.spec import Spec


class Example(TypedDict):
    inputs: np.ndarray  # ids [length] or, of a pair, [2 length], padded with 0; an image float32 [H W C]
    label: np.int32 | np.ndarray  # of the whole, or int [length] of each token, -1 where nothing is scored


class Source(Protocol):
    """Random access to a split."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Task(Protocol):
    """A data set with its splits and its metric; registered in arch.registry.TASKS under its config name.

    A task may have `augment(example, rng)`, which changes an example of the train split each time it is read, and
    `note`, what has to stand beside every figure made from this data.
    """

    metric: str  # "accuracy"
    chance: float  # the metric of a uniform guess
    token_labels: bool  # labels are of single tokens, for the head language_model

    @property
    def spec(self) -> Spec: ...

    @property
    def splits(self) -> Mapping[str, int]: ...  # examples in "train", "validation" and "test"

    @property
    def content_hash(self) -> str: ...  # SHA-256 over every example of every split, in order

    def prepare(self) -> None: ...  # makes or reads the data; again does nothing

    def source(self, split: str) -> Source: ...

    def majority(self, split: str) -> float: ...  # share of the split's most frequent class among what is scored


@dataclass(frozen=True)
class TokenExamples:
    """A split in memory: token strings laid end to end, example i at tokens[offsets[i] : offsets[i + 1]].

    Takes the bytes of its tokens and 9 an example: about 105 MB for all of full-size ListOps.
    """

    tokens: np.ndarray  # uint8, or wider where ids are larger [sum of lengths]
    offsets: np.ndarray  # int64 [examples + 1]
    labels: np.ndarray  # uint8 [examples]

    @classmethod
    def pack(cls, examples: Iterable[tuple[np.ndarray, int]], dtype: Any = np.uint8) -> "TokenExamples":
        pairs = list(examples)
        offsets = np.zeros(len(pairs) + 1, np.int64)
        np.cumsum([tokens.size for tokens, _ in pairs], out=offsets[1:])
        tokens = np.concatenate([np.zeros(0, dtype), *(tokens for tokens, _ in pairs)])
        return cls(tokens, offsets, np.array([label for _, label in pairs], np.uint8))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Tokens (a view, not padded) and label."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]], int(self.labels[index])

    def take(self, indices: np.ndarray) -> "TokenExamples":
        """Some of the examples, copied."""
        return self.pack((self[i] for i in indices.tolist()), self.tokens.dtype)

    def cut(self, length: int) -> "TokenExamples":
        """The same with no string longer than `length`."""
        return self.pack(((self[i][0][:length], self[i][1]) for i in range(len(self))), self.tokens.dtype)

    @property
    def content(self) -> tuple[np.ndarray, ...]:
        return self.lengths.astype("<u4"), self.tokens.astype(self.tokens.dtype.newbyteorder("<")), self.labels

    def majority(self) -> float:
        return majority(self.labels)


@dataclass(frozen=True)
class Padded:
    """A Source: token strings padded with 0 to one length. `shift` is added to each token: 1 makes ids of bytes."""

    examples: TokenExamples
    length: int
    shift: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        tokens, label = self.examples[index]
        return {"inputs": padded(tokens, self.length, self.shift), "label": np.int32(label)}


def padded(tokens: np.ndarray, length: int, shift: int = 0) -> np.ndarray:
    """tokens + shift and zeros behind them; int32 with a shift, else of the dtype of the tokens."""
    found = np.zeros(length, np.int32 if shift else tokens.dtype)
    found[: tokens.size] = tokens
    found[: tokens.size] += shift
    return found


class Content(Protocol):
    """A split in memory whose bytes can be hashed."""

    @property
    def content(self) -> tuple[np.ndarray, ...]: ...

    def __len__(self) -> int: ...


def content_hash(splits: Mapping[str, Content]) -> str:
    """SHA-256 over, for each split in order: a line `NAME COUNT`, then its content.

    Of token strings that is their lengths (uint32, little-endian), tokens (little-endian) and labels.
    """
    digest = hashlib.sha256()
    for name, examples in splits.items():
        digest.update(f"{name} {len(examples)}\n".encode())
        for part in examples.content:
            digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def majority(labels: np.ndarray) -> float:
    """Share of the most frequent label."""
    return float(np.bincount(labels).max() / labels.size)


def hold_out(count: int, held: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices 0 to count - 1 in two parts, each in order; the second has `held` of them, drawn by the seed.

    Drawn from the raw bits of Philox-4x64, which NumPy guarantees across versions and machines.
    """
    order = np.argsort(np.random.Philox(key=seed).random_raw(count), kind="stable")
    return np.sort(order[held:]), np.sort(order[:held])


def note(task: Any, form: str = "{}") -> str:
    """What has to stand beside the task's figures, in a form such as " ({})"; nothing for most tasks."""
    text = getattr(task, "note", "")
    return form.format(text) if text else ""


def data_root(data_dir: str | None) -> Path:
    """Where data sets live: data_dir, else $ARCHLOOM_DATA, else ~/.cache/archloom/data."""
    return Path(data_dir or os.environ.get("ARCHLOOM_DATA") or "~/.cache/archloom/data").expanduser().absolute()
