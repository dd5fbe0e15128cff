"""Language modelling on the bytes of any local file: from the bytes so far, the next one.

The file is cut at two places, in order: train, validation, test. A split is cut further into sequences of `length`
bytes, one behind the other; the target of each byte is the one after it, so a sequence takes length + 1 bytes and the
last of them is the first of the next sequence. What is left at the end of a split, less than a sequence, is not used.
Ids: 0 padding, which no sequence has, then byte + 1. Nothing of a split is in another, whatever the length: the same
file with another `length` is the same task, longer or shorter, as continual training wants it.
"""

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from arch.errors import ConfigError
from arch.registry import TASKS
from arch.schema import Positive, Range
from arch.spec import InputSpec
from experiments.data.spelling import from_bytes
from experiments.data.store import DataError
from experiments.data.task import Example, data_root

VOCAB = 1 + 256  # padding and the bytes
SPLITS = ("train", "validation", "test")
Share = Annotated[float, Range(above=0, below=1)]


@dataclass(frozen=True)
class Bytes:
    """A Source: the sequences of a split."""

    data: np.ndarray  # uint8, a view into the file
    length: int

    def __len__(self) -> int:
        return max(self.data.size - 1, 0) // self.length

    def __getitem__(self, index: int) -> Example:
        cut = self.data[index * self.length : (index + 1) * self.length + 1].astype(np.int32) + 1
        return {"inputs": cut[:-1], "label": cut[1:]}

    @property
    def targets(self) -> np.ndarray:
        """All that is scored, int32."""
        return self.data[1 : len(self) * self.length + 1].astype(np.int32) + 1


@TASKS.register("text_file")
class TextFile:
    """What byte comes next? The loss is in nats a byte; divided by log 2 it is bits a byte."""

    metric = "accuracy"  # of the next byte
    chance = 1 / 256
    token_labels = True

    def __init__(
        self,
        *,
        file: str,  # its name below data_dir, or its whole path
        length: Positive = 1024,  # bytes a sequence
        validation_share: Share = 0.05,  # of the file's bytes, behind those of train
        test_share: Share = 0.05,  # the end of the file
        data_dir: str | None = None,  # None: $ARCHLOOM_DATA, else ~/.cache/archloom/data
    ):
        if validation_share + test_share >= 1:
            raise ConfigError("test_share", f"{test_share:g} leaves no byte to train on; lower it or validation_share")
        self.path = data_root(data_dir) / Path(file).expanduser()
        self.shares = validation_share, test_share
        self.spec = InputSpec(vocab_size=VOCAB, num_classes=VOCAB, length=length)

    @functools.cached_property
    def _sources(self) -> dict[str, Bytes]:
        if not self.path.is_file():
            raise DataError(
                f"{self.path}: no such file; put any text there, or name another with task.data_dir and task.file"
            )
        data = np.fromfile(self.path, np.uint8)
        validation, test = (int(share * data.size) for share in self.shares)
        parts = np.split(data, [data.size - validation - test, data.size - test])
        sources = {name: Bytes(part, self.spec.length) for name, part in zip(SPLITS, parts)}
        for name, source in sources.items():
            if not len(source):
                raise DataError(
                    f"{self.path}: {data.size:,} bytes leave {source.data.size:,} for {name}, too few for a sequence "
                    f"of {self.spec.length} and its last target; lower task.length, raise the shares or take more text"
                )
        return sources

    @property
    def splits(self) -> Mapping[str, int]:
        return {name: len(source) for name, source in self._sources.items()}

    @functools.cached_property
    def content_hash(self) -> str:
        """SHA-256 over, for each split in order: a line `NAME COUNT LENGTH`, then the bytes its sequences take."""
        digest = hashlib.sha256()
        for name, source in self._sources.items():
            digest.update(f"{name} {len(source)} {source.length}\n".encode())
            digest.update(np.ascontiguousarray(source.data[: len(source) * source.length + 1]).data)
        return digest.hexdigest()

    def prepare(self) -> None:
        """Reads the file into memory."""
        _ = self._sources

    def spell(self, ids: Iterable[int]) -> list[str]:
        return from_bytes(ids)

    def source(self, split: str) -> Bytes:
        return self._sources[split]

    def majority(self, split: str) -> float:
        """Share of the most frequent byte."""
        targets = self.source(split).targets
        return float(np.bincount(targets).max() / targets.size)
