"""CIFAR-10: both copies on disk, decoded once, normalised, held out, augmented, and labelled for what they are."""

import io
import itertools
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from arch.errors import ConfigError
from arch.registry import TASKS
from arch.schema import resolve
from experiments.data import cifar10_files, images
from experiments.data.__main__ import main
from experiments.data.cifar10 import CIFAR10
from experiments.data.cifar10_files import BATCHES, CLASSES
from experiments.data.pipeline import eval_batches, train_batches
from experiments.data.store import DataError
from experiments.data.task import data_root

ROOT = data_root(None)  # as it is before a test points it elsewhere
COUNTS = {"train": 20, "test": 10}
RNG = np.random.default_rng(0)
PIXELS = {half: RNG.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8) for half, n in COUNTS.items()}
LABELS = {half: (np.arange(n) * 3 % 10).astype(np.uint8) for half, n in COUNTS.items()}
SMOOTH = {  # what JPEG keeps nearly: a ramp, one for each image
    half: np.clip(np.arange(32)[:, None, None] * 4 + np.arange(n)[:, None, None, None] * 5 + [0, 9, 60], 0, 255)
    .repeat(32, axis=2)
    .astype(np.uint8)
    for half, n in COUNTS.items()
}


def batches():
    """The binary files, four training images in each of five."""
    found = {}
    for half, names in BATCHES.items():
        parts = zip(np.split(PIXELS[half], len(names)), np.split(LABELS[half], len(names)))
        for name, (pixels, labels) in zip(names, parts):
            rows = [
                bytes([label]) + b"".join(image[:, :, c].tobytes() for c in range(3))
                for image, label in zip(pixels, labels)
            ]
            found[name] = b"".join(rows)
    return found


def as_files(folder):
    (folder / "cifar-10-batches-bin").mkdir()
    for name, content in batches().items():
        (folder / "cifar-10-batches-bin" / name).write_bytes(content)


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def as_archive(folder):
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as archive:
        add(archive, "cifar-10-batches-bin/batches.meta.txt", b"airplane\n")
        for name, content in reversed(batches().items()):
            add(archive, f"cifar-10-batches-bin/{name}", content)


def as_jpegs(folder):
    for half, images_ in SMOOTH.items():
        with tarfile.open(folder / f"{half}.tar.xz", "w:xz") as archive:
            for i, (image, label) in enumerate(zip(images_, LABELS[half])):
                stream = io.BytesIO()
                Image.fromarray(image).save(stream, "JPEG", quality=95)
                add(archive, f"{half}/{CLASSES[label]}/{i:04d}.jpg", stream.getvalue())


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("ARCHLOOM_DATA", str(tmp_path / "root"))
    return tmp_path / "root"


@pytest.fixture
def folder(tmp_path):
    as_files(tmp_path)
    return tmp_path


def task(folder, **options):
    return CIFAR10(data_dir=str(folder), **{"published": False, "validation_examples": 5, **options})


def all_images(found):
    """Bytes of every image with its label, whatever its split."""
    rows = [
        (image.tobytes(), int(label))
        for x in map(found.examples, found.splits)
        for image, label in zip(x.images, x.labels)
    ]
    return sorted(rows)


@pytest.mark.parametrize("form", [as_files, as_archive])
def test_the_exact_copy_is_read_from_either_form(form, tmp_path):
    form(tmp_path)
    found = task(tmp_path)
    assert found.splits == {"train": 15, "validation": 5, "test": 10}
    np.testing.assert_array_equal(found.examples("test").images, PIXELS["test"])
    np.testing.assert_array_equal(found.examples("test").labels, LABELS["test"])
    both = zip([*PIXELS["train"], *PIXELS["test"]], [*LABELS["train"], *LABELS["test"]])
    assert all_images(found) == sorted((image.tobytes(), int(label)) for image, label in both)
    assert found.note == ""
    assert found.content_hash == "14ff1e2be4bd20c62a2eb8dd9f5d1d65056334a92137e575a737219c013d1f92"


def test_the_jpeg_copy_is_decoded_and_says_what_it_is(tmp_path):
    as_jpegs(tmp_path)
    found = task(tmp_path, copy="JPEG-75")
    order = np.lexsort((np.arange(10), LABELS["test"]))
    np.testing.assert_array_equal(found.examples("test").labels, LABELS["test"][order])
    difference = found.examples("test").images.astype(int) - SMOOTH["test"][order]
    assert np.abs(difference).mean() < 3
    assert found.note == "JPEG-75, not official CIFAR-10"


def test_the_copy_is_never_swapped_in_silence(tmp_path, folder):
    with pytest.raises(DataError, match=r"train\.tar\.xz and test\.tar\.xz not in"):
        task(folder, copy="JPEG-75").prepare()
    shutil.rmtree(folder / "cifar-10-batches-bin")
    as_jpegs(tmp_path)
    with pytest.raises(DataError, match=r"no CIFAR-10 in .*SHA-256 c4a38c50.*set task.copy to JPEG-75"):
        task(tmp_path).prepare()


def test_held_out_by_the_data_seed(folder):
    splits = [{x.tobytes() for x in task(folder, data_seed=s).examples("validation").images} for s in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]
    assert not splits[0] & {x.tobytes() for x in task(folder).examples("train").images}


def test_inputs_are_normalised(folder):
    found = task(folder, mean=(0.5, 0.25, 0.1), std=(0.5, 0.2, 0.3))
    example = found.source("test")[3]
    want = (PIXELS["test"][3].astype(np.float64) / 255 - [0.5, 0.25, 0.1]) / [0.5, 0.2, 0.3]
    assert example["inputs"].dtype == np.float32
    np.testing.assert_allclose(example["inputs"], want, atol=1e-5)
    assert example["label"] == LABELS["test"][3]
    assert found.spec.shape == (32, 32, 3)


def test_batches_are_images_without_keep(folder):
    found = task(folder)
    stream = train_batches(found, batch_size=4, seed=0)
    for batch in (next(stream), *eval_batches(found, "test", 4)):
        assert set(batch) == {"inputs", "label", "weight"}
        assert batch["inputs"].shape == (4, 32, 32, 3)
        assert batch["inputs"].dtype == np.float32
    stream.close()


def take(found, count, **options):
    stream = train_batches(found, **{"batch_size": 5, "seed": 0, **options})
    rows = list(itertools.islice(stream, count))
    stream.close()
    return rows


def test_augmentation_is_a_function_of_seed_and_place(folder):
    found = task(folder, train_augment="flip_crop")
    rows = take(found, 12)
    again, later = take(task(folder, train_augment="flip_crop"), 12, threads=3), take(found, 5, start_step=7)
    for a, b in zip(rows + rows[7:], again + later):
        np.testing.assert_array_equal(a["inputs"], b["inputs"])
    halves = [take(found, 2, batch_size=6, shard=(i, 2)) for i in range(2)]
    whole = take(found, 2, batch_size=6)
    for step in range(2):
        np.testing.assert_array_equal(whole[step]["inputs"][::2], halves[0][step]["inputs"])
        np.testing.assert_array_equal(whole[step]["inputs"][1::2], halves[1][step]["inputs"])
    epochs = np.concatenate([row["inputs"] for row in rows]).reshape(4, 15, -1)
    assert len({image.tobytes() for epoch in epochs for image in epoch}) > 50, "another window every epoch"
    single = task(
        folder, train_augment="flip_crop", validation_examples=19
    )  # one image: the seeds differ in windows alone
    windows = [np.stack([row["inputs"] for row in take(single, 8, batch_size=1, seed=seed)]) for seed in (0, 1)]
    assert not np.array_equal(*windows)
    plain = {row.tobytes() for batch in take(task(folder), 3) for row in batch["inputs"]}
    assert len(plain) == 15
    test = next(eval_batches(found, "test", 10))
    np.testing.assert_array_equal(test["inputs"], next(eval_batches(task(folder), "test", 10))["inputs"])


def test_flip_crop_gives_every_window_and_its_mirror():
    image = np.arange(3 * 4 * 2, dtype=np.float32).reshape(3, 4, 2) + 1
    framed = np.pad(image, [(1, 1), (1, 1), (0, 0)], constant_values=-7)
    want = {framed[i : i + 3, j : j + 4][:, ::step].tobytes() for i in range(3) for j in range(3) for step in (1, -1)}
    black = np.full(2, -7, np.float32)
    got = [images.flip_crop(image, word, 1, black).tobytes() for word in range(18)]
    assert set(got) == want
    assert len(want) == 18


def test_the_second_start_reads_the_decoded_images(tmp_path, root, monkeypatch, capsys):
    as_jpegs(tmp_path)
    first = task(tmp_path, copy="JPEG-75").content_hash
    assert "images decoded in" in capsys.readouterr().err
    monkeypatch.setattr(cifar10_files, "read", lambda *_: pytest.fail("decoded again"))
    assert task(tmp_path, copy="JPEG-75").content_hash == first
    kept = next((root / "cifar10").glob("decoded-JPEG-75-*"))
    file = kept / "test_images.npy"
    content = file.read_bytes()
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[: len(content) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="delete it"):
            task(tmp_path, copy="JPEG-75").prepare()


def test_other_files_do_not_take_the_place_of_the_first(tmp_path, root):
    """What was decoded is known by the hash of its files."""
    as_jpegs(tmp_path)
    first = task(tmp_path, copy="JPEG-75").content_hash
    (tmp_path / "train.tar.xz").write_bytes((tmp_path / "train.tar.xz").read_bytes())
    assert task(tmp_path, copy="JPEG-75").content_hash == first
    SMOOTH["test"][0, 0, 0] ^= 64
    as_jpegs(tmp_path)
    SMOOTH["test"][0, 0, 0] ^= 64
    assert task(tmp_path, copy="JPEG-75").content_hash != first
    assert len(list((root / "cifar10").glob("decoded-*"))) == 2


def test_a_killed_writer_leaves_nothing_half(tmp_path, root, monkeypatch):
    as_jpegs(tmp_path)
    monkeypatch.setattr(images.os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        task(tmp_path, copy="JPEG-75").prepare()
    monkeypatch.undo()
    monkeypatch.setenv("ARCHLOOM_DATA", str(root))
    assert task(tmp_path, copy="JPEG-75").splits["test"] == 10
    assert not list((root / "cifar10").glob("*.incomplete"))
    kept = next((root / "cifar10").glob("decoded-*"))
    assert json.loads((kept / "content.json").read_text())["splits"] == ["train", "test"]


def test_other_images_are_refused_unless_asked_for(folder, tmp_path):
    with pytest.raises(DataError, match=r"train has \[2, 2.* not 5,000 each.*task.published"):
        task(folder, published=True).prepare()
    (tmp_path / "other").mkdir()
    as_archive(tmp_path / "other")
    with pytest.raises(DataError, match=r"has the SHA-256 .* not c4a38c50"):
        task(tmp_path / "other", published=True).prepare()
    assert CIFAR10().splits == {"train": 45_000, "validation": 5_000, "test": 10_000}, "known without the data"


def test_damaged_files_are_errors(folder):
    file = folder / "cifar-10-batches-bin" / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="are damaged"):
        task(folder).prepare()


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"validation_examples": 50_000}, "task.validation_examples"),
        ({"std": (0.2, 0.0, 0.2)}, "task.std"),
        ({"copy": "jpeg"}, "task.copy"),
        ({"data_seed": 2**64}, "task.data_seed"),
    ],
)
def test_options_that_contradict(options, path):
    with pytest.raises(ConfigError) as error:
        TASKS.build({"name": "cifar10", **resolve(options, TASKS.options("cifar10"), "task")}, path="task")
    assert error.value.path == path


def test_the_command_says_which_copy(tmp_path, capsys):
    as_jpegs(tmp_path)
    options = [f"--data_dir={tmp_path}", "--copy=JPEG-75", "--published=False", "--validation_examples=5"]
    assert main(["cifar10", *options]) == 0
    out = capsys.readouterr().out
    assert "JPEG-75, not official CIFAR-10" in out
    assert "median" not in out, "images have no length"


@pytest.mark.slow
@pytest.mark.parametrize("copy", ["exact", "JPEG-75"])
def test_the_published_images(copy, monkeypatch):
    """Every class as often as published; the mean and deviation of the pixels, within JPEG's loss, are the task's."""
    monkeypatch.setenv("ARCHLOOM_DATA", str(ROOT))
    found = CIFAR10(copy=copy)
    try:
        cifar10_files.sources(found.folder, copy)
    except DataError as missing:
        pytest.skip(f"not in the data root ($ARCHLOOM_DATA): {missing}")
    assert {name: len(found.examples(name)) for name in found.splits} == found.splits
    pixels = found.examples("train").images.reshape(-1, 3) / 255
    np.testing.assert_allclose(pixels.mean(axis=0), found.mean, atol=2e-3)
    np.testing.assert_allclose(pixels.std(axis=0), found.std, atol=3e-3)
