"""CIFAR-10 as it is found on disk: 50,000 colour images of 32 x 32 to train on, 10,000 to test on, ten classes.

Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images". Two copies are read:

    exact     cifar-10-binary.tar.gz as published, or its files data_batch_1.bin to data_batch_5.bin and test_batch.bin,
              in the folder or in cifar-10-batches-bin below it. A record is the label, a byte, and the red, green and
              blue planes, 1024 bytes each, row by row. (The "python version" is pickled and is not read.)
    JPEG-75   train.tar.xz and test.tar.xz with {train,test}/CLASS/NUMBER.jpg: the images after JPEG of quality 75.
              Lossy, not official CIFAR-10; the order of the images is lost and here by class and number.
"""

import hashlib
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.data.images import ImageExamples
from experiments.data.store import DataError

Copy = Literal["exact", "JPEG-75"]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZES = {"train": 50_000, "test": 10_000}
SIDE = 32
RECORD = 1 + 3 * SIDE * SIDE

ARCHIVE = "cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
BATCHES = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
JPEGS = {"train": "train.tar.xz", "test": "test.tar.xz"}
JPEG_NAME = re.compile(r"(?:\./)?(train|test)/([a-z]+)/(\d+)\.jpg")
FETCH = (
    f"take {ARCHIVE} (170,052,171 bytes, SHA-256 {SHA256}) from www.cs.toronto.edu/~kriz and put it there, packed or "
    "unpacked, or name its folder in task.data_dir"
)


def sources(folder: Path, copy: Copy) -> tuple[Path, ...]:
    """The files of a copy. Raises DataError, with what to fetch, if they are not there."""
    jpegs = tuple(folder / name for name in JPEGS.values())
    if copy == "JPEG-75":
        if all(file.is_file() for file in jpegs):
            return jpegs
        raise DataError(f"{' and '.join(JPEGS.values())} not in {folder}; name their folder in task.data_dir")
    for root in (folder, folder / "cifar-10-batches-bin"):
        batches = tuple(root / name for names in BATCHES.values() for name in names)
        if all(file.is_file() for file in batches):
            return batches
    if (folder / ARCHIVE).is_file():
        return (folder / ARCHIVE,)
    there = "; it has the JPEG copy: to use that, set task.copy to JPEG-75" if jpegs[0].is_file() else ""
    raise DataError(f"no CIFAR-10 in {folder}: {FETCH}{there}")


def sha256(files: tuple[Path, ...]) -> str:
    """Over the bytes of the files, in order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def read(files: tuple[Path, ...], copy: Copy) -> dict[str, ImageExamples]:
    """{"train", "test"} of the files that `sources` found. Raises DataError if they are damaged."""
    try:
        if copy == "JPEG-75":
            return {split: _jpegs(file, split) for split, file in zip(JPEGS, files)}
        return _batches(_unpacked(files[0]) if len(files) == 1 else {f.name: f.read_bytes() for f in files})
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, ValueError, KeyError) as error:
        raise DataError(f"{files[0].parent}: the files of the copy {copy} are damaged ({error})") from error


def _unpacked(archive: Path) -> dict[str, bytes]:
    found = {}
    with tarfile.open(archive, "r|gz") as members:
        for member in members:
            if member.name.endswith(".bin") and (content := members.extractfile(member)) is not None:
                found[Path(member.name).name] = content.read()
    return found


def _batches(contents: Mapping[str, bytes]) -> dict[str, ImageExamples]:
    splits = {}
    for split, names in BATCHES.items():
        data = np.frombuffer(b"".join(contents[name] for name in names), np.uint8)
        if data.size % RECORD:
            raise ValueError(f"{data.size} bytes are no whole number of records")
        records = data.reshape(-1, RECORD)
        planes = records[:, 1:].reshape(-1, 3, SIDE, SIDE)
        splits[split] = ImageExamples(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), records[:, 0].copy())
    return splits


def _jpegs(file: Path, split: str) -> ImageExamples:
    from PIL import Image

    found = {}
    with tarfile.open(file, "r|xz") as members:
        for member in members:
            name = JPEG_NAME.fullmatch(member.name)
            if name is None or (content := members.extractfile(member)) is None:
                continue
            half, kind, number = name.groups()
            if half != split or kind not in CLASSES:
                raise ValueError(f"{member.name} is not of the {split} half")
            with Image.open(io.BytesIO(content.read())) as image:
                pixels = np.asarray(image.convert("RGB"), np.uint8)
            if pixels.shape != (SIDE, SIDE, 3):
                raise ValueError(f"{member.name} is {pixels.shape}, not {SIDE} x {SIDE}")
            found[CLASSES.index(kind), int(number)] = pixels
    if not found:
        raise ValueError(f"no images in {file.name}")
    order = sorted(found)
    return ImageExamples(np.stack([found[key] for key in order]), np.array([label for label, _ in order], np.uint8))


def check(splits: Mapping[str, ImageExamples], folder: Path) -> None:
    """Refuses what has not the published number of images in every class."""
    for split, size in SIZES.items():
        counts = np.bincount(splits[split].labels, minlength=len(CLASSES)).tolist()
        if counts != [size // len(CLASSES)] * len(CLASSES):
            raise DataError(
                f"{folder}: {split} has {counts} images a class, not {size // len(CLASSES):,} each; take it anew, or "
                "set task.published to False"
            )
