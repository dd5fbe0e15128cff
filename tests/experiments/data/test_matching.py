"""The matching task on small files in LRA's format, its batches, and a model that learns from pairs."""

import jax
import numpy as np
import pytest

from arch.errors import ConfigError
from experiments import config as configs
from experiments.data.__main__ import main
from experiments.data.matching import SIZES, Matching
from experiments.data.pipeline import eval_batches, train_batches
from experiments.data.store import DataError
from experiments.program import Program

PAPERS = [b"a paper", b'another \xc3\xa9 "quoted" paper', b"x" * 40, b""]


def write(folder, split, rows, papers=PAPERS):
    lines = [b"\t".join([label, b"id%d" % a, b"id%d" % b, papers[a], papers[b]]) for label, a, b in rows]
    (folder / f"new_aan_pairs.{split}.tsv").write_bytes(b"".join(line + b"\n" for line in lines))


ROWS = {
    "train": [(b"1.0", 0, 1), (b"0", 1, 2), (b"1", 2, 0), (b"0.0", 0, 3), (b"1", 1, 1)],
    "eval": [(b"0", 2, 1), (b"1", 0, 1)],
    "test": [(b"0", 1, 0), (b"0", 0, 2), (b"1", 3, 2)],
}


@pytest.fixture
def folder(tmp_path):
    for split, rows in ROWS.items():
        write(tmp_path, split, rows)
    return tmp_path


def task(folder, **options):
    return Matching(data_dir=str(folder), **{"published": False, "max_length": 12, **options})


def test_rows_become_pairs_of_bytes(folder):
    found = task(folder)
    assert found.splits == {"train": 5, "validation": 2, "test": 3}
    assert found.spec.shape == (2, 12)
    assert found.spec.vocab_size == 257
    for split, rows in zip(("train", "validation", "test"), ROWS.values()):
        source = found.source(split)
        assert len(source) == len(rows)
        for i, (label, *papers) in enumerate(rows):
            assert source[i]["label"] == float(label)
            for side, paper in zip(source[i]["inputs"], papers):
                text = PAPERS[paper][:12]
                assert side.tolist() == [byte + 1 for byte in text] + [0] * (12 - len(text))
    assert found.majority("train") == pytest.approx(3 / 5)
    assert found.majority("test") == pytest.approx(2 / 3)
    assert found.examples("train").lengths.tolist() == [[7, 12], [12, 12], [12, 7], [7, 0], [12, 12]]
    assert len(found.examples("train").texts) == 4, "a text is held once"
    assert found.content_hash == "167e43116b7873f2c1b2c2c134364c13c2493e4f533f9ac55d8314364e1dc15b"
    assert task(folder, max_length=11).content_hash != found.content_hash


def test_batches(folder):
    found = task(folder)
    batches = train_batches(found, batch_size=2, seed=0)
    for batch in (next(batches), *eval_batches(found, "test", 2)):
        assert batch["inputs"].shape == batch["keep"].shape == (2, 2, 12)
        assert batch["inputs"].dtype == np.int32
        assert batch["label"].shape == batch["weight"].shape == (2,)
        np.testing.assert_array_equal(batch["keep"], batch["inputs"] > 0)
    batches.close()


def test_missing_files_are_named(folder, monkeypatch):
    (folder / "new_aan_pairs.eval.tsv").unlink()
    with pytest.raises(DataError, match=r"^new_aan_pairs.eval.tsv not in .*: take them from .* lra_release"):
        task(folder).prepare()
    monkeypatch.setenv("ARCHLOOM_DATA", str(folder / "root"))
    with pytest.raises(DataError, match=str(folder / "root" / "matching")):
        Matching().prepare()
    assert Matching().splits == SIZES, "known without the data"


def test_other_sizes_are_refused_unless_asked_for(folder):
    with pytest.raises(DataError, match=r"task\.published"):
        task(folder, published=True).prepare()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"1\ta\tb\tone text", "train.tsv, line 6: 4 columns"),
        (b"1\ta\tb\tone\ttwo\tthree", "train.tsv, line 6: 6 columns"),
        (b"label\ta\tb\tone\ttwo", "train.tsv, line 6: the label 'label'"),
        (b"2\ta\tb\tone\ttwo", "train.tsv, line 6: the label '2'"),
    ],
)
def test_wrong_lines_are_named(line, message, folder):
    with (folder / "new_aan_pairs.train.tsv").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(DataError, match=message):
        task(folder).prepare()


def test_a_length_that_the_release_does_not_keep():
    with pytest.raises(ConfigError, match="max_length"):
        Matching(max_length=10_001)


def test_a_model_learns_whether_two_texts_are_one(tmp_path):
    """Program: batches of pairs through sharding, the train step, and an evaluation that covers its split."""
    papers = [bytes([97 + i]) * 6 for i in range(4)]
    rows = [(b"1" if a == b else b"0", a, b) for a in range(4) for b in (a, (a + 1) % 4)]
    for split in ROWS:
        write(tmp_path, split, rows, papers)
    config = configs.resolve(
        {
            "task": {"name": "matching", "data_dir": str(tmp_path), "published": False, "max_length": 8},
            "model": {
                "topology": "metaformer",
                "width": 16,
                "depth": 1,
                "layers": ("mixer",),
                "channel": "mlp",
                "parts": {"mixer": {"kind": "softmax", "num_heads": 2}, "mlp": {"kind": "mlp", "hidden": 16}},
                "norm": {"name": "layer"},
                "positions": {"name": "sinusoid"},
                "head": {"name": "matching", "hidden": 32, "pooling": "mean", "features": "nli"},
            },
            "optimizer": {"name": "adamw", "lr": 1e-2, "schedule": {"name": "constant"}},
            "train": {"steps": 60, "batch_size": 8, "eval_batch_size": 6},
        }
    )
    program = Program(config)
    with jax.set_mesh(program.mesh):
        state, batches, losses = program.init(), program.batches(), []
        for _ in range(60):
            state, values = program.train_step(state, program.put(next(batches)))
            losses.append(float(values[0]))
        batches.close()
        found = program.evaluate(state["params"], "test")
    assert losses[-1] < 0.1 < 0.4 < losses[0]
    assert found["accuracy"] == 1
    assert found["examples"] == 8


def test_the_command_counts_texts_and_pairs(folder, capsys):
    assert main(["matching", f"--data_dir={folder}", "--published=False", "--max_length=12"]) == 0
    rows = {line.split()[0]: line.split() for line in reversed(capsys.readouterr().out.splitlines()) if line}
    assert rows["split"][1:] == ["examples", "scored", "mean", "p10", "median", "p90", "min", "max", "majority"]
    assert rows["train"][1] == "5", rows
