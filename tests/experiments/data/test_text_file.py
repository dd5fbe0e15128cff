"""Bytes of a file as a task: what is cut where, and what is refused."""

import hashlib

import numpy as np
import pytest

from arch.errors import ConfigError
from arch.registry import TASKS
from experiments.data import pipeline
from experiments.data.store import DataError

TEXT = bytes(range(256)) * 4  # byte i of the file is i mod 256


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.txt"
    path.write_bytes(TEXT)
    return path


def make(file, **options):
    return TASKS.build(
        {"name": "text_file", "file": file.name, "data_dir": str(file.parent), "length": 16, **options}, path="task"
    )


def test_sequences_follow_each_other_and_targets_are_the_next_bytes(file):
    task = make(file, validation_share=0.125, test_share=0.25)
    assert task.splits == {"train": (640 - 1) // 16, "validation": (128 - 1) // 16, "test": (256 - 1) // 16}
    for name, start in (("train", 0), ("validation", 640), ("test", 768)):
        source = task.source(name)
        for index in (0, 1, len(source) - 1):
            at = (start + 16 * index + np.arange(17)) % 256
            np.testing.assert_array_equal(source[index]["inputs"], at[:-1] + 1)
            np.testing.assert_array_equal(source[index]["label"], at[1:] + 1)
        labels = np.concatenate([source[i]["label"] for i in range(len(source))])
        np.testing.assert_array_equal(source.targets, labels)
    assert task.spec.vocab_size == task.spec.num_classes == 257


def test_splits_share_no_byte_at_any_length(file):
    """So a run at one length may be scored, or go on, at another."""
    short, long = make(file), make(file, length=40)
    for task in (short, long):
        used = {name: len(task.source(name)) * task.spec.length + 1 for name in task.splits}
        starts = {"train": 0, "validation": 1024 - 51 - 51, "test": 1024 - 51}
        assert starts["train"] + used["train"] <= starts["validation"]
        assert starts["validation"] + used["validation"] <= starts["test"]
        assert starts["test"] + used["test"] <= 1024
    np.testing.assert_array_equal(short.source("test").data, long.source("test").data)


def test_hash_is_of_what_is_used(file):
    task = make(file, validation_share=0.25, test_share=0.25)
    digest = hashlib.sha256()
    for name, count, start in (("train", 31, 0), ("validation", 15, 512), ("test", 15, 768)):
        digest.update(f"{name} {count} 16\n".encode() + TEXT[start : start + 16 * count + 1])
    assert task.content_hash == digest.hexdigest()
    file.write_bytes(TEXT[:-1] + b"x")  # of the last, unused, bytes
    assert make(file, validation_share=0.25, test_share=0.25).content_hash == digest.hexdigest()
    file.write_bytes(b"x" + TEXT[1:])
    assert make(file, validation_share=0.25, test_share=0.25).content_hash != digest.hexdigest()


def test_batches_are_what_the_trainer_takes(file):
    batch = next(pipeline.train_batches(make(file), batch_size=4, seed=0))
    assert batch["inputs"].shape == batch["label"].shape == batch["keep"].shape == (4, 16)
    assert batch["keep"].all()
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["label"][:, :-1])


def test_majority_is_the_most_frequent_target(file):
    file.write_bytes(b"ab" * 8 + b"aaab" * 16 + b"cccd" * 16)
    task = make(file, validation_share=64 / 144, test_share=64 / 144, length=3)
    assert task.majority("test") == pytest.approx(np.mean(task.source("test").targets == ord("c") + 1))
    assert 0.7 < task.majority("test") < 0.8


def test_a_missing_file_says_where_it_is_looked_for(tmp_path):
    task = make(tmp_path / "absent.txt")
    assert task.spec.length == 16  # planning needs no data
    with pytest.raises(DataError, match=r"absent\.txt: no such file; .*task\.data_dir"):
        task.prepare()


def test_too_short_a_file_is_refused(file):
    with pytest.raises(DataError, match=r"leave 51 for validation, too few for a sequence of 51.*task\.length"):
        make(file, length=51).prepare()
    assert make(file, length=50).splits["validation"] == 1


def test_shares_must_leave_something(file):
    with pytest.raises(ConfigError, match=r"task\.test_share"):
        make(file, validation_share=0.5, test_share=0.5)


def test_a_whole_path_needs_no_data_dir(file):
    task = TASKS.build({"name": "text_file", "file": str(file), "length": 16})
    assert task.source("train")[0]["inputs"][0] == 1
