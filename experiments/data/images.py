"""Images of one size held in memory as bytes, normalised when they are read, and kept decoded on disk."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.data.store import DataError, locked
from experiments.data.task import Example, content_hash, majority


@dataclass(frozen=True)
class ImageExamples:
    """A split in memory."""

    images: np.ndarray  # uint8 [N H W C]
    labels: np.ndarray  # uint8 [N]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "ImageExamples":
        """Some of the examples, copied."""
        return ImageExamples(self.images[indices], self.labels[indices])

    @property
    def content(self) -> tuple[np.ndarray, ...]:
        return self.images, self.labels

    def majority(self) -> float:
        return majority(self.labels)


@dataclass(frozen=True)
class Normalised:
    """A Source: (pixel / 255 - mean) / std of each channel, float32 [H W C]."""

    examples: ImageExamples
    mean: np.ndarray  # float32 [C]
    std: np.ndarray  # float32 [C]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        image = self.examples.images[index].astype(np.float32)
        return {
            "inputs": (image / np.float32(255) - self.mean) / self.std,
            "label": np.int32(self.examples.labels[index]),
        }


def flip_crop(image: np.ndarray, word: int, margin: int, black: np.ndarray) -> np.ndarray:
    """A window of the image's size out of the image in a black margin, mirrored half of the time.

    The standard augmentation of CIFAR-10 (He et al. 2016, arXiv:1512.03385). The random word decides all: its lowest
    bit the mirror, the rest the window.
    """
    height, width, _ = image.shape
    mirror, rest = word & 1, word >> 1
    top, left = rest % (2 * margin + 1), rest // (2 * margin + 1) % (2 * margin + 1)
    framed = np.empty((height + 2 * margin, width + 2 * margin, image.shape[2]), image.dtype)
    framed[:] = black
    framed[margin : margin + height, margin : margin + width] = image
    window = framed[top : top + height, left : left + width]
    return np.ascontiguousarray(window[:, ::-1] if mirror else window)


def cached(folder: Path, make: Callable[[], dict[str, ImageExamples]]) -> dict[str, ImageExamples]:
    """The images in `folder`, decoded there once by `make`. A damaged folder is a DataError.

    It is written beside its place and renamed, under a lock, so a folder that exists is whole.
    """
    with locked(folder.parent / f".{folder.name}.lock"):
        if not folder.is_dir():
            _write(folder, make)
    try:
        about = json.loads((folder / "content.json").read_text())
        found = {
            name: ImageExamples(*(np.load(folder / f"{name}_{part}.npy") for part in ("images", "labels")))
            for name in about["splits"]
        }
        if content_hash(found) != about["content_hash"]:
            raise ValueError("the content hash differs")
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{folder} is damaged ({error}); delete it, and it is made again") from error
    return found


def _write(folder: Path, make: Callable[[], dict[str, ImageExamples]]) -> None:
    start, making = time.perf_counter(), folder.with_name(f"{folder.name}.incomplete")
    splits = make()
    if making.exists():
        shutil.rmtree(making)  # of a process that was killed: we hold the lock
    making.mkdir(parents=True)
    for name, examples in splits.items():
        np.save(making / f"{name}_images.npy", examples.images)
        np.save(making / f"{name}_labels.npy", examples.labels)
    (making / "content.json").write_text(json.dumps({"splits": list(splits), "content_hash": content_hash(splits)}))
    os.rename(making, folder)
    print(f"images decoded in {time.perf_counter() - start:.1f} s; kept in {folder}", file=sys.stderr, flush=True)
