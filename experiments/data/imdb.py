"""IMDb: is a film review negative (0) or positive (1)? Long Range Arena's text task, and the words that go with it.

Source: Maas et al. 2011, ACL (the reviews); Tay et al. 2020, arXiv:2011.04006 (bytes); Brown et al. 2022,
arXiv:2210.00640 (words). The reviews are read from a folder; experiments/data/imdb_files.py says in which forms.

level "bytes": ids 1 to 256 are the bytes 0 to 255. "words": 1 is any unknown word, from 2 on the most frequent words of
the train split, case kept, punctuation dropped. 0 is padding in both, and a text is cut at max_length ids. The release
keeps every word of the train half, in no stated order; here vocab_size says how many.

protocol "sound" holds validation_examples of the train half out, drawn by data_seed. "release" is the Long Range Arena
release: all of the train half trains, and the validation split is the test split, so the best checkpoint is chosen on
what it is then scored on. Half of either half is negative: chance and majority class are 50 %.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from arch.errors import ConfigError
from arch.registry import TASKS
from arch.schema import NonNegative, Positive
from arch.spec import InputSpec
from experiments.data import imdb_files
from experiments.data.imdb_files import HASH, SIZE
from experiments.data.spelling import from_bytes
from experiments.data.store import DataError
from experiments.data.task import Padded, TokenExamples, content_hash, data_root, hold_out

UNKNOWN = 1  # the id of a word that the vocabulary lacks


@TASKS.register("imdb")
class IMDb:
    """25,000 reviews to train and validate on, 25,000 to test on, held in memory as they were cut."""

    metric = "accuracy"
    chance = 0.5
    token_labels = False

    def __init__(
        self,
        *,
        level: Literal["bytes", "words"] = "bytes",
        max_length: Positive = 1000,  # bytes or words; the rest of a review is cut off
        vocab_size: Positive = 30_000,  # of level "words": ids in all, padding and unknown included
        protocol: Literal["sound", "release"] = "sound",
        validation_examples: Positive = 2_500,  # of the train half, in the sound protocol
        data_seed: NonNegative = 0,  # which reviews validate; the order of training is the run's seed
        data_dir: str | None = None,  # the folder with the reviews; None: the folder imdb of the data root
        published: bool = True,  # refuse any but the published reviews; False takes whatever has their form
    ):
        if level == "words" and vocab_size < 3:
            raise ConfigError("vocab_size", "leaves no id for a word beside padding and unknown; use 3 or more")
        if published and validation_examples >= SIZE:
            raise ConfigError("validation_examples", f"the train half has {SIZE:,}; leave some to train on")
        if data_seed >= 2**64:
            raise ConfigError("data_seed", "does not fit in 64 bits; use a smaller one")
        self.level, self.protocol, self.published = level, protocol, published
        self.validation_examples, self.data_seed = validation_examples, data_seed
        self.folder = data_root(None) / "imdb" if data_dir is None else Path(data_dir).expanduser()
        self.spec = InputSpec(257 if level == "bytes" else vocab_size, num_classes=2, length=max_length)
        self._examples: dict[str, TokenExamples] = {}
        self._vocabulary: dict[int, str] = {}
        self._hash = ""

    @property
    def splits(self) -> Mapping[str, int]:
        if self.published:
            held = self.validation_examples
            sizes = (SIZE - held, held, SIZE) if self.protocol == "sound" else (SIZE, SIZE, SIZE)
            return dict(zip(("train", "validation", "test"), sizes))
        self.prepare()
        return {name: len(examples) for name, examples in self._examples.items()}

    @property
    def content_hash(self) -> str:
        self.prepare()
        return self._hash

    def prepare(self) -> None:
        """Reads the reviews into memory, checks that they are the published ones, cuts and encodes them."""
        if self._examples:
            return
        halves = imdb_files.read(self.folder)
        if self.published and (found := content_hash(halves)) != HASH:
            raise DataError(
                f"{self.folder}: these are not the published reviews (content hash {found}, not {HASH}); "
                f"{imdb_files.FETCH}, or set task.published to False"
            )
        splits = self._split(halves)
        if self.level == "words":
            splits = self._words(splits)
        else:
            splits = {name: examples.cut(self.spec.length) for name, examples in splits.items()}
        self._examples, self._hash = splits, content_hash(splits)

    def _split(self, halves: Mapping[str, TokenExamples]) -> dict[str, TokenExamples]:
        train, test = halves["train"], halves["test"]
        if self.protocol == "release":
            return {"train": train, "validation": test, "test": test}
        if self.validation_examples >= len(train):
            raise DataError(f"{self.folder}: {len(train)} reviews to train on; lower task.validation_examples")
        kept, held = hold_out(len(train), self.validation_examples, self.data_seed)
        return {"train": train.take(kept), "validation": train.take(held), "test": test}

    def _words(self, splits: Mapping[str, TokenExamples]) -> dict[str, TokenExamples]:
        texts = {
            name: [imdb_files.words(x[i][0].tobytes()) for i in range(len(x))]
            for name, x in splits.items()
            if name != "validation" or self.protocol == "sound"
        }
        ids = imdb_files.vocabulary(texts["train"], self.spec.vocab_size - 2)
        self._vocabulary = {i: word for word, i in ids.items()}
        length = self.spec.length
        encoded = {
            name: TokenExamples.pack(
                (
                    (np.array([ids.get(word, UNKNOWN) for word in text[:length]], np.int32), label)
                    for text, label in zip(rows, splits[name].labels.tolist())
                ),
                np.int32,
            )
            for name, rows in texts.items()
        }
        return {name: encoded.get(name, encoded["test"]) for name in splits}  # release: validation is test

    def examples(self, split: str) -> TokenExamples:
        """A split, cut but not padded; bytes as they are, words as ids."""
        self.prepare()
        return self._examples[split]

    def spell(self, ids: Iterable[int]) -> list[str]:
        """Bytes as characters, words with a space behind."""
        if self.level == "bytes":
            return from_bytes(ids)
        self.prepare()
        return [self._vocabulary.get(i, "?") + " " for i in ids]

    def source(self, split: str) -> Padded:
        return Padded(self.examples(split), self.spec.length, shift=1 if self.level == "bytes" else 0)

    def majority(self, split: str) -> float:
        return self.examples(split).majority()
