"""Whole diffusion runs of a second: judged by their loss, gone on with after a kill, sampled, left out of tables."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import cli, evaluate, sample, tables, train
from experiments import config as configs
from experiments.files import read_json, read_lines, write_json
from experiments.reporting.cells import TableError, read_table
from experiments.runs import read_run
from tests.experiments import tiny_images
from tests.experiments.test_resume import results, stop_at

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("programs_kept")


def run(folder, objective="flow_matching", **overrides):
    return train.train(tiny_images.config(objective, **overrides), folder, "tiny_images.py")


@pytest.fixture(scope="module")
def done(tmp_path_factory, programs_kept):
    folder = tmp_path_factory.mktemp("flow")
    assert run(folder) == 0
    return folder


def test_a_run_says_nothing_of_an_accuracy(done):
    for file in ("summary.json", "metrics.jsonl"):
        assert "accuracy" not in (done / file).read_text()
    summary = read_json(done / "summary.json")
    assert set(summary["task"]) == {"name", "content_hash"}
    assert set(summary["final"]["test"]) == {"loss", "examples"}
    lines = {
        split: [r for r in read_lines(done / "metrics.jsonl") if r["split"] == split]
        for split in ("train", "validation")
    }
    assert lines["validation"][-1]["loss"] < lines["validation"][0]["loss"]
    best = min(lines["validation"], key=lambda r: r["loss"])
    assert (summary["best"]["step"], summary["best"]["loss"]) == (best["step"], best["loss"])
    assert read_run(done).objective == "flow_matching"


def test_the_lowest_loss_is_the_best(tmp_path, monkeypatch):
    from experiments.program import Program

    losses = iter([0.5, 0.3, 0.4, 0.35, 0.2, 0.3])  # validation at 6, 12, 18, 24; test at the end and at the best
    inner = Program.evaluate
    monkeypatch.setattr(Program, "evaluate", lambda self, *args: {**inner(self, *args), "loss": next(losses)})
    assert run(tmp_path) == 0
    best = read_json(tmp_path / "summary.json")["best"]
    assert (best["step"], best["loss"], best["test"]["loss"]) == (12, 0.3, 0.3)


def test_what_is_printed(tmp_path, capsys):
    assert run(tmp_path, train__steps=6) == 0
    out, err = capsys.readouterr()
    assert "done, 6 steps; test loss " in out
    assert "validation loss " in err
    assert "accuracy" not in out + err
    assert "majority" not in out + err


def test_evaluation_again_finds_the_same_loss(done):
    """In batches of another size too: the noise is a function of the example."""
    want = read_json(done / "summary.json")["final"]["test"]["loss"]
    for overrides in ({}, {"train.eval_batch_size": "5"}):
        found = evaluate.evaluate(done, "last", "test", overrides)
        assert found["loss"] == pytest.approx(want, rel=1e-5)
        assert "majority" not in found
        assert "accuracy" not in found


def test_killed_and_resumed_is_the_same(tmp_path, done):
    flags = [f"--config={tiny_images.__file__}", f"--workdir={tmp_path}"]
    words = [sys.executable, "-m", "tests.experiments.tiny_images", *flags]
    env = {**os.environ, "TINY_KILL": "15"}
    killed = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert run(tmp_path) == 0
    assert results(tmp_path) == results(done)


def test_stopped_and_resumed_is_the_same(tmp_path, monkeypatch, done):
    stop_at(monkeypatch, 8)
    assert run(tmp_path) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert run(tmp_path) == 0
    assert results(tmp_path) == results(done)


def test_bf16_accumulation_and_velocity(tmp_path):
    options = {"train__precision": "bf16", "optimizer__accumulate": 2, "objective__predict": "velocity"}
    assert run(tmp_path, "ddpm", train__steps=6, objective__timesteps=20, model__head__conditional=True, **options) == 0
    assert np.isfinite(read_json(tmp_path / "summary.json")["final"]["test"]["loss"])
    assert draw(tmp_path, "--sampler=ancestral", "--label=each", "--guidance=2", "--steps=5")[0] == 0


def draw(folder, *words, name="samples.png"):
    out = folder / name
    code = cli.command(sample.main)([f"--run={folder}", f"--out={out}", "--count=7", "--steps=6", *words])
    return code, out


def test_samples(done, capsys):
    code, out = draw(done)
    assert code == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["sampler"], about["step"], about["parameters"]) == ("heun", 24, "ema")
    pixels = np.load(out.with_suffix(".npy"))
    assert pixels.shape == (7, 8, 8, 3)
    assert pixels.dtype == np.float32
    assert 0 <= pixels.min() < pixels.max() <= 1
    from PIL import Image

    with Image.open(out) as picture:
        assert picture.size == (3 * 96, 3 * 96)
        corner = np.asarray(picture)[::12, ::12][:8, 8:16]  # the second image, a pixel of each 12 x 12
        np.testing.assert_allclose(corner, pixels[1] * 255, atol=0.51)
    again, other, more = (
        np.load(draw(done, *words, name=f"{n}.png")[1].with_suffix(".npy"))
        for n, words in enumerate((["--count=7"], ["--seed=1"], ["--count=12"]))
    )
    np.testing.assert_array_equal(again, pixels)
    assert np.abs(other - pixels).max() > 0.01
    np.testing.assert_allclose(more[:7], pixels, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sampler=ddim"], "--sampler: unknown sampler 'ddim' (known: euler, heun)"),
        (["--steps=0"], "--steps: 0; give"),
        (["--label=1"], "--label: the run learnt no classes"),
        (["--guidance=2"], "--guidance: guides towards a class"),
        (["--checkpoint=7"], "--checkpoint: '7' is not"),
    ],
)
def test_wrong_flags_are_refused(done, capsys, words, message):
    assert draw(done, *words)[0] == 2
    assert message in capsys.readouterr().err


def refused(match, objective="flow_matching", **overrides):
    with pytest.raises(configs.ConfigError, match=match):
        tiny_images.config(objective, **overrides)


def test_head_and_objective_must_fit():
    refused(r"model\.head\.name: denoiser gives image and the objective classify needs logits", "classify")
    refused(
        r"model\.head\.name: classifier gives logits .* use denoiser",
        model__head__name="classifier",
        model__head__pooling="mean",
    )
    refused(r"train\.label_smoothing: flow_matching has no labels", train__label_smoothing=0.1)
    refused(r"objective\.name: unknown objective 'flow_mathcing'; did you mean 'flow_matching'", "flow_mathcing")
    refused(r"objective\.timesteps", "ddpm", objective__timesteps=1)
    refused(
        r"model\.head\.name: .*choose|model\.head\.name: denoiser makes images",
        task__name="tiny",
        model__embedding__name="tokens",
    )


def test_tables_leave_the_runs_out(done, tmp_path):
    shutil.copytree(done, tmp_path / "flow")
    with pytest.raises(TableError, match="only runs without an accuracy, of the objectives flow_matching"):
        read_table(tmp_path, "tiny_images")
    assert cli.command(tables.main)(["tiny_images", f"--runs={tmp_path}"]) == 2
    shutil.copytree(done, tmp_path / "classified")
    saved = read_json(tmp_path / "classified" / "config.json")
    saved["config"]["objective"]["name"], saved["hash"] = "classify", "0" * 12
    write_json(tmp_path / "classified" / "config.json", saved)
    (tmp_path / "classified" / "summary.json").unlink()
    table = read_table(tmp_path, "tiny_images")
    assert [cell.hash for cell in table.cells] == ["0" * 12]
    assert any("left out: 1 runs without an accuracy" in warning for warning in table.warnings)


def test_a_sampler_in_one_program(done):
    """One loop over the steps: the compiled text does not grow with them."""
    program, params, _ = evaluate.checkpoint(done, "last")

    def size(steps):
        draw = sample.sampler(program, name=None, steps=steps)
        lowered = draw.lower(params, jax.random.key(0), np.arange(2), None)
        return lowered.as_text().count("\n")

    assert size(8) == size(4)
