"""The matrix of mixers and roles: a handful of cells here, all of them among the slow tests."""

import re

import pytest

from arch.errors import ConfigError
from arch.registry import MIXERS
from experiments import matrix
from experiments.matrices import pool, records, tasks
from experiments.matrices.cells import ROLES, Cell, cells, forms
from experiments.matrices.run import run


@pytest.fixture(scope="module", autouse=True)
def quick():
    import jax

    pool.quick()
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def lowered(cell: Cell) -> None:
    outcome = run(cell)
    assert outcome["status"] == "lowered", outcome
    assert outcome["loss_after"] < outcome["loss_before"]
    assert outcome["params"] > 0 and outcome["unmoved"] == []  # noqa: PT018  the outcome tells which


@pytest.mark.parametrize(
    "cell",
    [
        Cell("linear", "wide"),
        Cell("softmax", "pyramid"),
        Cell("fourier", "masformer near", "causal=False"),
    ],
    ids=lambda cell: cell.name,
)
def test_cells_lower_their_loss(cell):
    lowered(cell)


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (Cell("mamba", "metaformer"), "parts.mixer.kind: mamba has no bidirectional form.*wrap it"),
        (Cell("mamba", "pyramid"), "parts.mixer.kind: mamba has no bidirectional form"),
        (Cell("fourier", "masformer full"), "parts.full.kind: fourier has no causal form.*causal=False"),
        (Cell("pooling", "wide"), "pooling has no num_heads; only mixers with heads can be widened"),
    ],
    ids=lambda value: value.name if isinstance(value, Cell) else "",
)
def test_cells_are_refused_before_anything_compiles(cell, reason, monkeypatch):
    from experiments.program import Program

    monkeypatch.setattr(Program, "init", property(lambda self: pytest.fail("compiled")))
    outcome = run(cell)
    assert outcome["status"] == "refused", outcome
    assert re.search(reason, outcome["reason"]), outcome["reason"]


def test_every_refused_mode_has_its_remedy():
    found = cells()
    assert {cell.mixer for cell in found} == set(MIXERS.names())
    assert {cell.role for cell in found} == set(ROLES)
    assert forms("mamba", "pyramid") == [Cell("mamba", "pyramid"), Cell("mamba", "pyramid", "bidirectional")]
    assert forms("softmax", "pyramid") == [Cell("softmax", "pyramid")]
    with pytest.raises(ConfigError, match="did you mean 'pyramid'"):
        cells(roles=["pyramide"])


def test_a_run_resumes(tmp_path, capsys):
    words = ["--mixers=fourier", "--roles=wide", f"--record={tmp_path / 'matrix.jsonl'}", "--workers=1", "--resume"]
    assert matrix.main(words) == 0
    assert "1 refused" in capsys.readouterr().out
    matrix.main(words)
    assert "0 cells to run, 1 on record" in capsys.readouterr().out
    (record,) = records.read(tmp_path / "matrix.jsonl")
    assert record["status"] == "refused" and record["commit"], record  # noqa: PT018


@pytest.mark.parametrize("kind", [tasks.Tokens, tasks.Images])
def test_tasks_are_the_same_every_time(kind):
    assert kind().content_hash == kind().content_hash
    assert kind().majority("validation") < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("cell", cells(), ids=lambda cell: cell.name)
def test_the_whole_matrix(cell):
    outcome = run(cell)
    assert outcome["status"] in ("lowered", "refused"), outcome
