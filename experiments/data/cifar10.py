"""CIFAR-10: which of ten things is on a small colour image?

Source: Krizhevsky 2009. Inputs are float32 [32 32 3], normalised by the mean and standard deviation of the exact set's
training pixels. 10 % of the training images, drawn by data_seed, are held out to validate on.

`copy` names what is on disk (experiments/data/cifar10_files.py). Figures of the copy JPEG-75 are not figures of
official CIFAR-10: every line and record of such a run says so. Decoded images are kept in the data root, about 180 MB.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from arch.errors import ConfigError
from arch.registry import TASKS
from arch.schema import NonNegative, Positive
from arch.spec import ImageSpec
from experiments.data import cifar10_files
from experiments.data.cifar10_files import ARCHIVE, CLASSES, SHA256, SIDE, SIZES, Copy
from experiments.data.images import ImageExamples, Normalised, cached, flip_crop
from experiments.data.store import DataError
from experiments.data.task import Example, content_hash, data_root, hold_out

MARGIN = 4  # black pixels around an image, out of which a window is cut


@TASKS.register("cifar10")
class CIFAR10:
    """45,000 images to train, 5,000 to validate and 10,000 to test on, held in memory as bytes."""

    metric = "accuracy"
    chance = 0.1
    token_labels = False

    def __init__(
        self,
        *,
        copy: Copy = "exact",
        train_augment: Literal["none", "flip_crop"] = "none",  # a function of the run's seed and the place in its order
        validation_examples: Positive = 5_000,  # of the training images
        data_seed: NonNegative = 0,  # which images validate; the order of training is the run's seed
        mean: tuple[float, float, float] = (0.4914, 0.4822, 0.4465),  # red, green, blue of the exact set, 0 to 1
        std: tuple[float, float, float] = (0.2470, 0.2435, 0.2616),
        data_dir: str | None = None,  # the folder with the files; None: the folder cifar10 of the data root
        published: bool = True,  # refuse other files than the published; False takes whatever has their form
    ):
        if published and validation_examples >= SIZES["train"]:
            raise ConfigError("validation_examples", f"there are {SIZES['train']:,} images; leave some to train on")
        if data_seed >= 2**64:
            raise ConfigError("data_seed", "does not fit in 64 bits; use a smaller one")
        if min(std) <= 0:
            raise ConfigError("std", f"{min(std):g} is not above 0")
        self.copy, self.published, self.train_augment = copy, published, train_augment
        self.validation_examples, self.data_seed = validation_examples, data_seed
        self.mean, self.std = np.array(mean, np.float32), np.array(std, np.float32)
        self.folder = data_root(None) / "cifar10" if data_dir is None else Path(data_dir).expanduser()
        self.spec = ImageSpec(SIDE, SIDE, 3, num_classes=len(CLASSES))
        self._examples: dict[str, ImageExamples] = {}
        self._hash = ""

    @property
    def note(self) -> str:
        """What every figure made from these images has to say."""
        return "" if self.copy == "exact" else f"{self.copy}, not official CIFAR-10"

    @property
    def splits(self) -> Mapping[str, int]:
        if self.published:
            held = self.validation_examples
            return {"train": SIZES["train"] - held, "validation": held, "test": SIZES["test"]}
        self.prepare()
        return {name: len(examples) for name, examples in self._examples.items()}

    @property
    def content_hash(self) -> str:
        self.prepare()
        return self._hash

    def prepare(self) -> None:
        """Reads the images into memory, from the decoded copy if there is one."""
        if self._examples:
            return
        files = cifar10_files.sources(self.folder, self.copy)
        found = cifar10_files.sha256(files)
        if self.published and files[0].name == ARCHIVE and found != SHA256:
            raise DataError(f"{files[0]} has the SHA-256 {found}, not {SHA256}: {cifar10_files.FETCH}")
        kept = data_root(None) / "cifar10" / f"decoded-{self.copy}-{found[:16]}"
        halves = cached(kept, lambda: cifar10_files.read(files, self.copy))
        if self.published:
            cifar10_files.check(halves, self.folder)
        train = halves["train"]
        if self.validation_examples >= len(train):
            raise DataError(f"{self.folder}: {len(train)} images to train on; lower task.validation_examples")
        rest, held = hold_out(len(train), self.validation_examples, self.data_seed)
        splits = {"train": train.take(rest), "validation": train.take(held), "test": halves["test"]}
        self._examples, self._hash = splits, content_hash(splits)

    @property
    def augment(self) -> Callable[[Example, Any], Example] | None:
        """What happens to a training example each time it is read."""
        return None if self.train_augment == "none" else self._augment

    def _augment(self, example: Example, rng: np.random.Generator) -> Example:
        word = int(rng.bit_generator.random_raw())  # the raw bits are the same in every version of NumPy
        image = flip_crop(example["inputs"], word, MARGIN, -self.mean / self.std)
        return {"inputs": image, "label": example["label"]}

    def examples(self, split: str) -> ImageExamples:
        """A split, as bytes."""
        self.prepare()
        return self._examples[split]

    def source(self, split: str) -> Normalised:
        return Normalised(self.examples(split), self.mean, self.std)

    def majority(self, split: str) -> float:
        return self.examples(split).majority()
