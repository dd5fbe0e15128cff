"""ImageNet: how a photograph becomes an input, and what is said when the data set is not there."""

import io

import numpy as np
import pytest
from PIL import Image

from arch.registry import TASKS
from experiments.data.imagenet import DEVIATION, MEAN, TEST, TRAIN, Photographs, centre, random_cut
from experiments.data.store import DataError


def picture(width: int, height: int) -> bytes:
    """Grey, brighter to the right and, in green, downwards; PNG, so that nothing is lost."""
    pixels = np.full((height, width, 3), 40, np.uint8)
    pixels[..., 0] = np.linspace(0, 250, width)
    pixels[..., 1] = np.linspace(0, 250, height)[:, None]
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def pixels(image: np.ndarray) -> np.ndarray:
    return (image * DEVIATION + MEAN) * 255


def test_the_centre_of_a_photograph():
    """200 x 100, half of the shorter side kept: the middle 50 x 50 at its own scale, red from 3/8 to 5/8 of the way."""
    image = centre(picture(200, 100), size=50, crop=0.5)
    assert image.shape == (50, 50, 3)
    assert image.dtype == np.float32
    got = pixels(image)
    np.testing.assert_allclose(got[0, [0, -1], 0], [75 / 199 * 250, 124 / 199 * 250], atol=1)
    np.testing.assert_allclose(got[[0, -1], 0, 1], [25 / 99 * 250, 74 / 99 * 250], atol=1)
    np.testing.assert_allclose(got[..., 2], 40, atol=0.01)


def test_random_cuts():
    """Another one each time, the same from the same bits; flipped in half the cases; no less than 8 % of the area."""
    data = picture(120, 80)
    again = [random_cut(data, 16, np.random.default_rng(3)) for _ in range(2)]
    np.testing.assert_array_equal(*again)
    rng = np.random.default_rng(0)
    cuts = [pixels(random_cut(data, 16, rng)) for _ in range(200)]
    flipped = np.mean([cut[0, 0, 0] > cut[0, -1, 0] for cut in cuts])
    assert 0.35 < flipped < 0.65
    widths = [abs(cut[8, 15, 0] - cut[8, 0, 0]) / 250 for cut in cuts]  # shares of the sides, up to resampling
    heights = [abs(cut[15, 8, 1] - cut[0, 8, 1]) / 250 for cut in cuts]
    areas = np.array(widths) * np.array(heights)
    assert 0.05 < areas.min() < 0.2
    assert 0.7 < areas.max() < 1


def test_records_as_examples():
    records = [{"image": picture(40, 30), "label": 7}]
    example = Photographs(records, 16, 0.9)[0]
    assert example["inputs"].shape == (16, 16, 3)
    assert example["label"] == 7
    task = TASKS.build({"name": "imagenet", "size": 16, "train_augment": "resized_crop"})
    encoded = Photographs(records, 16, 0.9, encoded=True)[0]
    assert encoded["inputs"].dtype == np.uint8
    assert task.augment(encoded, np.random.default_rng(0))["inputs"].shape == task.spec.shape == (16, 16, 3)


def test_splits_of_the_protocols():
    sound, release = (TASKS.build({"name": "imagenet", "protocol": name}) for name in ("sound", "release"))
    assert sound.splits == {"train": TRAIN - 10_000, "validation": 10_000, "test": TEST}
    assert release.splits == {"train": TRAIN, "validation": TEST, "test": TEST}
    assert sound.majority("test") == release.majority("validation") == sound.chance == 0.001


def test_a_missing_data_set_says_what_to_do(tmp_path):
    task = TASKS.build({"name": "imagenet", "data_dir": str(tmp_path)})
    with pytest.raises(DataError, match=r"ILSVRC2012_img_train\.tar.*tfds build imagenet2012") as caught:
        task.source("train")
    assert str(tmp_path) in str(caught.value)
