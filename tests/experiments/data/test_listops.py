"""The ListOps task on disk: made once, whole or not at all, checked on every read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from arch.errors import ConfigError
from arch.registry import TASKS
from arch.schema import resolve
from configs import quickstart
from configs.lra import listops as lra_listops
from experiments.data import listops
from experiments.data.__main__ import main
from experiments.data.listops import PINNED, ListOps
from experiments.data.store import DataError

SMALL = {"max_length": 64, "max_depth": 4, "train_examples": 64, "validation_examples": 16, "test_examples": 16}
SMALL_HASH = "60612904de26b627c386852484a29867dcdc6c5b1658ceed531abace685f07d7"
ROOT = Path(__file__).parents[3]


def small(folder, **options):
    return ListOps(data_dir=str(folder), **{**SMALL, **options})


def folder_of(task):
    return next(Path(task.data_dir).glob(f"listops/{task.variant}/*"))


def run(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_splits_sources_and_hash(tmp_path, capsys):
    task = small(tmp_path)
    assert task.splits == {"train": 64, "validation": 16, "test": 16}
    assert task.content_hash == SMALL_HASH
    assert (task.spec.vocab_size, task.spec.num_classes, task.spec.length) == (16, 10, 64)
    seen = set()
    for split, size in task.splits.items():
        source = task.source(split)
        assert len(source) == size
        for i in range(size):
            example = source[i]
            assert example["inputs"].shape == (64,)
            length = np.count_nonzero(example["inputs"])
            assert 16 < length < 64, "default min_length is a quarter of max_length"
            assert not example["inputs"][length:].any()
            seen.add(example["inputs"].tobytes())
        labels = [source[i]["label"] for i in range(size)]
        assert task.majority(split) == max(labels.count(label) for label in range(10)) / size
    assert len(seen) == 96, "a duplicate over the splits"
    assert task.chance == 0.1
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.split()[1] for line in said.err.splitlines()] == ["making", "made"], "the data library is to be silent"


def test_second_use_reads(tmp_path, monkeypatch, capsys):
    small(tmp_path).prepare()
    capsys.readouterr()
    monkeypatch.setattr(listops, "generate", lambda *_: pytest.fail("made again"))
    assert small(tmp_path).content_hash == SMALL_HASH
    assert capsys.readouterr().err == ""


def test_variants_live_side_by_side(tmp_path):
    tasks = [small(tmp_path), small(tmp_path, data_seed=1), small(tmp_path, min_length=20), small(tmp_path, max_args=5)]
    assert len({task.content_hash for task in tasks}) == 4
    assert len({folder_of(task) for task in tasks}) == 4


def test_data_dir_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ARCHLOOM_DATA", str(tmp_path / "here"))
    ListOps(**SMALL).prepare()
    assert (tmp_path / "here" / "listops").is_dir()


def configured(config):
    return {key: x for key, x in config.get_config().task.items() if key != "name"}


def test_the_quick_start_has_the_pinned_data(tmp_path):
    task = ListOps(**{**configured(quickstart), "data_dir": str(tmp_path)})
    assert task.content_hash == PINNED[task.variant]


def test_the_lra_config_has_the_pinned_data():
    assert ListOps(**configured(lra_listops)).variant == ListOps().variant in PINNED


@pytest.mark.slow
def test_full_set(tmp_path):
    """Lengths by the exact law: mean 1035.0 (standard error 1.3), p10 577, median 954, p90 1643."""
    task = ListOps(data_dir=str(tmp_path))
    assert task.content_hash == PINNED[task.variant]
    assert task.splits == {"train": 96_000, "validation": 2_000, "test": 2_000}
    lengths, labels = task.examples("train").lengths, task.examples("train").labels
    assert lengths.min() == 501
    assert lengths.max() == 1999
    assert abs(lengths.mean() - 1035.0) < 4
    assert np.abs(np.percentile(lengths, (10, 50, 90)) - (577, 954, 1643)).max() < 8
    shares = np.bincount(labels) / len(labels)
    assert shares[[0, 9]].min() > 0.16
    assert shares[1:9].max() < 0.095


def test_another_hash_than_the_pinned_is_refused(tmp_path, monkeypatch):
    task = small(tmp_path)
    monkeypatch.setitem(PINNED, task.variant, "0" * 64)
    with pytest.raises(DataError, match=r"content hash .* is pinned"):
        task.prepare()
    assert not list(tmp_path.glob("listops/*/*")), "refused data is not to be kept"
    monkeypatch.delitem(PINNED, task.variant)
    small(tmp_path).prepare()
    monkeypatch.setitem(PINNED, task.variant, "0" * 64)
    with pytest.raises(DataError, match="is pinned"):
        small(tmp_path).prepare()


def test_damaged_files_are_noticed(tmp_path):
    """A flipped bit is an error, or sits in the format's filling and changes no example; a cut file is an error."""
    task = small(tmp_path, train_examples=500)
    task.prepare()
    file = next(folder_of(task).glob("listops-train.array_record*"))
    intact = file.read_bytes()
    filled = [i for i, byte in enumerate(intact) if byte]
    complaints = []
    for place in filled[:: len(filled) // 40]:
        file.write_bytes(intact[:place] + bytes([intact[place] ^ 1]) + intact[place + 1 :])
        try:
            assert small(tmp_path, train_examples=500).content_hash == task.content_hash
        except DataError as error:
            complaints.append(str(error))
    assert len(complaints) > 30
    assert all("delete it" in complaint for complaint in complaints)
    file.write_bytes(intact[: len(intact) // 2])
    with pytest.raises(DataError, match="delete it"):
        small(tmp_path, train_examples=500).prepare()
    file.write_bytes(intact)
    for name in ("metadata.json", "dataset_info.json"):
        content = (folder_of(task) / name).read_bytes()
        (folder_of(task) / name).unlink()
        with pytest.raises(DataError, match="delete it"):
            small(tmp_path, train_examples=500).prepare()
        (folder_of(task) / name).write_bytes(content)
    small(tmp_path, train_examples=500).prepare()


def test_a_file_of_another_variant_is_noticed(tmp_path):
    one, other = small(tmp_path), small(tmp_path, data_seed=1)
    one.prepare()
    other.prepare()
    name = "listops-test.array_record-00000-of-00001"
    (folder_of(one) / name).write_bytes((folder_of(other) / name).read_bytes())
    with pytest.raises(DataError, match="is damaged"):
        small(tmp_path).prepare()


KILLED = """
import os, sys
from experiments.data import task
from experiments.data.listops import ListOps
options = dict(max_length=64, max_depth=4, train_examples=64, validation_examples=16, test_examples=16)
get = task.TokenExamples.__getitem__
task.TokenExamples.__getitem__ = lambda self, i: os._exit(9) if (len(self), i) == (16, 8) else get(self, i)
ListOps(data_dir=sys.argv[1], **options).prepare()
"""


def test_killed_while_writing_leaves_nothing_half(tmp_path):
    process = run(KILLED, tmp_path)
    process.communicate(timeout=120)
    assert process.returncode == 9
    task = small(tmp_path)
    left = list(tmp_path.glob(f"listops/{task.variant}/*"))
    assert left
    assert all("incomplete" in path.name for path in left)
    assert task.content_hash == SMALL_HASH
    assert [path.name for path in tmp_path.glob(f"listops/{task.variant}/*")] == [listops.VERSION]


TOGETHER = """
import sys
from experiments.data.listops import ListOps
options = dict(max_length=64, max_depth=4, train_examples=64, validation_examples=16, test_examples=16)
print(ListOps(data_dir=sys.argv[1], **options).content_hash, "tensorflow" in sys.modules, "jax" in sys.modules)
"""


def test_processes_that_start_together_make_it_once(tmp_path):
    """And neither TensorFlow nor jax is needed to make or read it."""
    processes = [run(TOGETHER, tmp_path) for _ in range(3)]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [out.split() for out, _ in answers] == [[SMALL_HASH, "False", "False"]] * 3, answers
    assert sum(error.count("listops: made") for _, error in answers) == 1


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"max_length": 100, "min_length": 99}, "min_length"),
        ({"max_length": 100, "min_length": 500}, "min_length"),
        ({"max_depth": 1}, "max_depth"),
        ({"max_args": 1}, "max_args"),
        ({"data_seed": 2**64}, "data_seed"),
    ],
)
def test_options_that_contradict(options, path):
    with pytest.raises(ConfigError) as error:
        TASKS.build({"name": "listops", **resolve(options, TASKS.options("listops"), "task")}, path="task")
    assert error.value.path.endswith(path)


def test_too_few_trees_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"task.train_examples: only 0 distinct .* lower min_length"):
        small(tmp_path, max_depth=2, max_args=3).prepare()


def test_command(tmp_path, capsys):
    options = [f"--{key}={x}" for key, x in SMALL.items()] + [f"--data_dir={tmp_path}"]
    assert main(["listops", *options, "--json", f"--export_tsv={tmp_path / 'tsv'}"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["content_hash"] == SMALL_HASH
    assert facts["splits"]["all"]["examples"] == 96
    assert sum(facts["splits"]["all"]["class_shares"]) == pytest.approx(1)
    assert main(["listops", f"--tsv_dir={tmp_path / 'tsv'}"]) == 0
    assert SMALL_HASH in capsys.readouterr().out, "the same examples through LRA's files"
    assert main(["listops", "--max_lenght=64"]) == 2
    assert capsys.readouterr().err.startswith("task.max_lenght: unknown key 'max_lenght'; did you mean 'max_length'?")
    assert main(["listop"]) == 2
    assert "did you mean 'listops'?" in capsys.readouterr().err
