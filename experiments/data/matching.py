"""Matching: does one of two papers cite the other? Long Range Arena's retrieval task, over the bytes of both texts.

Source: Radev et al. 2013, the ACL Anthology Network corpus (the papers); Tay et al. 2020, arXiv:2011.04006 (the pairs).
An example is two texts, each cut at max_length bytes, and the label 1 if they are linked, else 0. Ids 1 to 256 are the
bytes 0 to 255; 0 is padding. Half of the pairs are linked: chance is 50 %.

The files are LRA's, one for each split, without a header, quotes not special:

    label <TAB> id1 <TAB> id2 <TAB> text1 <TAB> text2       label 0 or 1, also written 0.0 or 1.0

A text that occurs in many pairs is held once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arch.errors import ConfigError
from arch.registry import TASKS
from arch.schema import Positive
from arch.spec import InputSpec
from experiments.data.spelling import from_bytes
from experiments.data.store import DataError
from experiments.data.task import Example, TokenExamples, content_hash, data_root, majority, padded

FILES = {
    name: f"new_aan_pairs.{part}.tsv" for name, part in (("train", "train"), ("validation", "eval"), ("test", "test"))
}
SIZES = {"train": 147_086, "validation": 18_090, "test": 17_437}  # as the later reproductions count them
COLUMNS = ("label", "id1", "id2", "text1", "text2")
LABELS = {b"0": 0, b"0.0": 0, b"1": 1, b"1.0": 1}
FETCH = (
    "take them from the folder tsv_data of the lra_release archive linked in the README of "
    "github.com/google-research/long-range-arena (no hash of them is known here) and put them there, or name their "
    "folder in task.data_dir"
)


@dataclass(frozen=True)
class TokenPairs:
    """A split in memory: every text once, a byte a token, and for each pair which two it is."""

    texts: TokenExamples  # their labels mean nothing
    pairs: np.ndarray  # int32 [N 2], indices into texts
    labels: np.ndarray  # uint8 [N]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Of both texts of each pair, int64 [N 2]."""
        return self.texts.lengths[self.pairs]

    @property
    def content(self) -> tuple[np.ndarray, ...]:
        return (*self.texts.content[:2], self.pairs.astype("<i4"), self.labels)


@dataclass(frozen=True)
class PaddedPairs:
    """A Source: both texts as ids, padded with 0 to one length, int32 [2 length]."""

    examples: TokenPairs
    length: int

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        texts = [self.examples.texts[i][0] for i in self.examples.pairs[index].tolist()]
        inputs = np.stack([padded(text, self.length, shift=1) for text in texts])
        return {"inputs": inputs, "label": np.int32(self.examples.labels[index])}


def read_file(path: Path, length: int) -> TokenPairs:
    """One file, texts cut at `length` bytes. Raises DataError, with the line, if it is not in LRA's format."""
    known: dict[bytes, int] = {}
    pairs, labels = [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            cells = line.rstrip(b"\r\n").split(b"\t")
            if len(cells) != len(COLUMNS):
                raise DataError(f"{path}, line {number}: {len(cells)} columns, not {' '.join(COLUMNS)}")
            if cells[0] not in LABELS:
                raise DataError(
                    f"{path}, line {number}: the label {cells[0][:20].decode(errors='replace')!r} is not 0 or 1"
                )
            labels.append(LABELS[cells[0]])
            pairs.append([known.setdefault(text[:length], len(known)) for text in cells[3:]])
    if not pairs:
        raise DataError(f"{path}: no pairs")
    texts = TokenExamples.pack((np.frombuffer(text, np.uint8), 0) for text in known)
    return TokenPairs(texts, np.array(pairs, np.int32), np.array(labels, np.uint8))


@TASKS.register("matching")
class Matching:
    """147,086 pairs to train, 18,090 to validate and 17,437 to test on; the head is `matching`."""

    metric = "accuracy"
    chance = 0.5
    token_labels = False

    def __init__(
        self,
        *,
        max_length: Positive = 4000,  # bytes of each text; the rest is cut off
        data_dir: str | None = None,  # the folder with the three files; None: the folder matching of the data root
        published: bool = True,  # refuse files of other sizes than LRA's; False takes whatever has their form
    ):
        if max_length > 10_000:
            raise ConfigError("max_length", f"{max_length}: the release keeps 10,000 bytes of a text; use no more")
        self.published = published
        self.folder = data_root(None) / "matching" if data_dir is None else Path(data_dir).expanduser()
        self.spec = InputSpec(257, num_classes=2, length=max_length, pair=True)
        self._examples: dict[str, TokenPairs] = {}
        self._hash = ""

    @property
    def splits(self) -> Mapping[str, int]:
        if self.published:
            return SIZES
        self.prepare()
        return {name: len(pairs) for name, pairs in self._examples.items()}

    @property
    def content_hash(self) -> str:
        self.prepare()
        return self._hash

    def prepare(self) -> None:
        """Reads the pairs into memory."""
        if self._examples:
            return
        missing = [name for name in FILES.values() if not (self.folder / name).is_file()]
        if missing:
            raise DataError(f"{', '.join(missing)} not in {self.folder}: {FETCH}")
        found = {split: read_file(self.folder / name, self.spec.length) for split, name in FILES.items()}
        sizes = {split: len(pairs) for split, pairs in found.items()}
        if self.published and sizes != SIZES:
            raise DataError(f"{self.folder}: pairs {sizes}, not {SIZES}; {FETCH}, or set task.published to False")
        self._examples, self._hash = found, content_hash(found)

    def examples(self, split: str) -> TokenPairs:
        self.prepare()
        return self._examples[split]

    def spell(self, ids: Iterable[int]) -> list[str]:
        return from_bytes(ids)

    def source(self, split: str) -> PaddedPairs:
        return PaddedPairs(self.examples(split), self.spec.length)

    def majority(self, split: str) -> float:
        return majority(self.examples(split).labels)
