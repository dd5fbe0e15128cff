"""A run on images from the first file to the table: it learns, resumes to the same bits, and says what its data is."""

import json

import numpy as np
import pytest

from experiments import config as configs
from experiments import evaluate, tables, train
from experiments.data.cifar10_files import BATCHES
from experiments.data.images import ImageExamples

NOTE = "JPEG-75, not official CIFAR-10"


def write(folder, split, labels, images):
    """Images as the exact copy's binary files, in so many as the split has."""
    rows = [bytes([label]) + image.transpose(2, 0, 1).tobytes() for label, image in zip(labels, images)]
    names = BATCHES[split]
    for name, part in zip(names, np.array_split(np.arange(len(rows)), len(names))):
        (folder / name).write_bytes(b"".join(rows[i] for i in part))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Class k is brighter in channel k mod 3, for classes 0 to 2."""
    monkeypatch.setenv("ARCHLOOM_DATA", str(tmp_path / "root"))
    rng = np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 12)):
        labels = np.arange(count) % 3
        images = rng.integers(0, 120, (count, 32, 32, 3)).astype(np.uint8)
        images[np.arange(count), :, :, labels] += 100
        write(tmp_path, split, labels.tolist(), images)
    return tmp_path


def config(data, **task):
    return configs.resolve(
        {
            "task": {
                "name": "cifar10", "data_dir": str(data), "published": False, "validation_examples": 12,
                "train_augment": "flip_crop", **task,
            },
            "model": {
                "topology": "metaformer", "width": 8, "depth": 1, "layers": ("mixer",), "channel": "mlp",
                "parts": {"mixer": {"kind": "pooling"}, "mlp": {"kind": "mlp", "hidden": 16}},
                "norm": {"name": "layer"}, "embedding": {"name": "patches", "size": 8},
                "positions": {"name": "learned"}, "head": {"name": "classifier", "pooling": "mean"},
            },
            "optimizer": {"name": "adamw", "lr": 1e-2, "schedule": {"name": "constant"}},
            "train": {"steps": 24, "batch_size": 8, "eval_every": 12, "save_every": 12, "log_every": 6},
        }
    )  # fmt: skip


def read(file):
    return json.loads(file.read_text())


def test_images_from_the_files_to_the_table(data, monkeypatch, capsys):
    first = data / "runs" / "first"
    assert train.train(config(data), first, "configs/vision/cifar10.py:tiny") == 0
    summary = read(first / "summary.json")
    assert summary["final"]["test"]["accuracy"] > 0.8
    assert "note" not in summary["task"]
    assert "JPEG" not in capsys.readouterr().out

    stopped = data / "stopped"  # the same, cut short and gone on with
    half = configs.plain(config(data))
    half["train"]["steps"] = 12
    assert train.train(configs.resolve(half), stopped, "x") == 0
    (stopped / "summary.json").unlink()
    saved = read(first / "config.json")
    (stopped / "config.json").write_text(json.dumps(saved))
    assert train.train(config(data), stopped, "x") == 0
    assert read(stopped / "summary.json")["param_hash"] == summary["param_hash"]


def test_the_jpeg_copy_is_named_wherever_a_figure_stands(data, monkeypatch, capsys):
    from experiments.data import cifar10_files

    rng = np.random.default_rng(1)
    halves = {
        split: ImageExamples(
            rng.integers(0, 255, (n, 32, 32, 3)).astype(np.uint8), (np.arange(n) % 10).astype(np.uint8)
        )
        for split, n in (("train", 40), ("test", 10))
    }
    for name in cifar10_files.JPEGS.values():
        (data / name).write_bytes(b"")
    monkeypatch.setattr(cifar10_files, "read", lambda files, copy: halves)
    run = data / "runs" / "jpeg"
    assert train.train(config(data, copy="JPEG-75"), run, "configs/vision/cifar10.py:tiny") == 0
    said = capsys.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if "validation" in line]
    assert len(lines) == 3
    assert all(NOTE in line for line in lines)
    assert read(run / "summary.json")["task"]["note"] == NOTE
    assert evaluate.main([f"--run={run}"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["note"] == NOTE
    assert NOTE in said.err
    assert tables.main(["cifar10", f"--runs={data / 'runs'}"]) == 0
    assert NOTE in capsys.readouterr().out.replace("\n", " ")
