"""ImageNet-1K: what does a photograph show? 1000 classes, 1,281,167 images to train and 50,000 to test on.

Source: Russakovsky et al. 2015, arXiv:1409.0575. Read with tfds.data_source from a prepared TFDS data set, without
TensorFlow. An image is scaled (bicubic) so that its shorter side is size / crop, its centre of size x size is cut out,
and the channels are normalised by the mean and deviation that everyone uses. train_augment "resized_crop" instead cuts
a random rectangle of 8 to 100 % of the image, 3:4 to 4:3, out of a train image and flips every other one, as the papers
do (Szegedy et al. 2014, arXiv:1409.4842); their colour, mixing and erasing augmentations are not here.

The test split is the published validation set, whose labels are known. protocol "sound" validates on the last
validation_examples of the train set; "release" is what the papers do: all of the train set trains, and the best epoch
is chosen on the set that is then reported. Chance and majority class are 0.1 %.
"""

import hashlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
from PIL import Image

from arch.errors import ConfigError
from arch.registry import TASKS
from arch.schema import Positive, Range
from arch.spec import ImageSpec
from experiments.data.store import DataError
from experiments.data.task import Example, data_root

TRAIN, TEST, CLASSES = 1_281_167, 50_000, 1000
LARGEST = 1300  # images of the most frequent class of the train set
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
FETCH = (
    "get ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from image-net.org, put them into a folder DIR and run "
    "`tfds build imagenet2012 --file_format=array_record --manual_dir=DIR --data_dir={}` where TensorFlow is installed"
)


@TASKS.register("imagenet")
class ImageNet:
    """Images float32 [size size 3], decoded when asked for; nothing is held in memory."""

    metric = "accuracy"
    chance = 1 / CLASSES
    token_labels = False

    def __init__(
        self,
        *,
        size: Positive = 224,  # pixels along each side
        crop: Annotated[float, Range(above=0, high=1)] = 0.9,  # share of the shorter side that is kept
        train_augment: Literal["none", "resized_crop"] = "none",  # of the run's seed and the place in its order
        protocol: Literal["sound", "release"] = "sound",
        validation_examples: Positive = 10_000,  # of the train set, in the sound protocol
        data_dir: str | None = None,  # TFDS's folder; None: the data root
    ):
        if validation_examples >= TRAIN:
            raise ConfigError("validation_examples", f"the train set has {TRAIN:,}; leave some to train on")
        self.size, self.crop, self.train_augment = size, crop, train_augment
        self.protocol, self.held = protocol, validation_examples
        self.folder = data_root(data_dir)
        self.spec = ImageSpec(height=size, width=size, channels=3, num_classes=CLASSES)
        self._builder: Any = None

    @property
    def splits(self) -> Mapping[str, int]:
        if self.protocol == "release":
            return {"train": TRAIN, "validation": TEST, "test": TEST}
        return {"train": TRAIN - self.held, "validation": self.held, "test": TEST}

    @property
    def content_hash(self) -> str:
        """Of TFDS's version and the lengths and bytes of its shards: hashing 150 GB of pictures would take hours."""
        self.prepare()
        digest = hashlib.sha256(self._builder.info.full_name.encode())
        for name in ("train", "validation"):
            split = self._builder.info.splits[name]
            digest.update(f"{name} {split.num_bytes} {list(split.shard_lengths)}\n".encode())
        return digest.hexdigest()

    def prepare(self) -> None:
        """Finds the data set and checks that it is whole."""
        if self._builder is not None:
            return
        import tensorflow_datasets as tfds

        builder = tfds.builder("imagenet2012", data_dir=self.folder, file_format="array_record")
        if not builder.is_prepared():
            raise DataError(f"{Path(builder.data_dir)} has no data set: {FETCH.format(self.folder)}")
        found = {name: builder.info.splits[name].num_examples for name in ("train", "validation")}
        if found != {"train": TRAIN, "validation": TEST}:
            raise DataError(f"{Path(builder.data_dir)} holds {found}, not all images: {FETCH.format(self.folder)}")
        self._builder = builder

    def source(self, split: str) -> "Photographs":
        self.prepare()
        import tensorflow_datasets as tfds

        kept = TRAIN - self.held
        slices = {"train": f"train[:{kept}]", "validation": f"train[{kept}:]"} if self.protocol == "sound" else {}
        name = {"train": "train", "validation": "validation", "test": "validation", **slices}[split]
        records = self._builder.as_data_source(split=name, decoders={"image": tfds.decode.SkipDecoding()})
        records = cast("Sequence[Mapping[str, Any]]", records)
        return Photographs(records, self.size, self.crop, encoded=split == "train" and self.augment is not None)

    @property
    def augment(self) -> Callable[[Example, Any], Example] | None:
        """What happens to a training example each time it is read: its picture comes still encoded."""
        return None if self.train_augment == "none" else self._augment

    def _augment(self, example: Example, rng: np.random.Generator) -> Example:
        return {"inputs": random_cut(example["inputs"].tobytes(), self.size, rng), "label": example["label"]}

    def majority(self, split: str) -> float:
        """Of the whole set that the split is cut from."""
        even = split == "test" or (split == "validation" and self.protocol == "release")  # 50 a class
        return 1 / CLASSES if even else LARGEST / TRAIN


@dataclass(frozen=True)
class Photographs:
    """A Source over records {"image": JPEG bytes, "label": class}; encoded: inputs are those bytes, uint8."""

    records: Sequence[Mapping[str, Any]]
    size: int
    crop: float
    encoded: bool = False

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        data = record["image"]
        inputs = np.frombuffer(data, np.uint8) if self.encoded else centre(data, self.size, self.crop)
        return {"inputs": inputs, "label": np.int32(record["label"])}


def centre(data: bytes, size: int, crop: float) -> np.ndarray:
    """The middle of a picture as float32 [size size 3], normalised."""
    picture = _open(data)
    scale = size / crop / min(picture.size)
    width, height = (max(size, round(n * scale)) for n in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    picture = picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return _normalised(picture)


def random_cut(data: bytes, size: int, rng: np.random.Generator) -> np.ndarray:
    """A rectangle of the picture scaled to [size size 3], normalised: area uniform, aspect uniform in its logarithm."""

    def uniform(low: float, high: float) -> float:
        word = int(rng.bit_generator.random_raw())  # the raw bits are the same in every version of NumPy
        return low + (high - low) * (word >> 11) * 2.0**-53

    picture = _open(data)
    area = picture.width * picture.height
    for _ in range(10):
        share, aspect = uniform(0.08, 1), math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * share * aspect)), round(math.sqrt(area * share / aspect))
        if 0 < width <= picture.width and 0 < height <= picture.height:
            break
    else:  # the largest square
        width = height = min(picture.size)
    left = math.floor(uniform(0, picture.width - width + 1))
    top = math.floor(uniform(0, picture.height - height + 1))
    cut = picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    image = _normalised(cut)
    return image[:, ::-1].copy() if uniform(0, 1) < 0.5 else image


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _normalised(picture: Image.Image) -> np.ndarray:
    return (np.asarray(picture, np.float32) / 255 - MEAN) / DEVIATION
