"""A run that was stopped, however, ends with the same bits as one that was not."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import train
from experiments.checkpoint import Checkpoints
from experiments.files import read_json, read_lines
from experiments.metrics import Ledger
from experiments.program import Program
from tests.experiments import tiny
from tests.experiments.test_checkpoint import damage, quiet_uvloop

ROOT = Path(__file__).resolve().parents[2]
PLACED = 24 + 4 * 3 + 2  # batches a run places: steps, evaluations of 20 rows by 8, the test of 12 rows by 8
pytestmark = pytest.mark.usefixtures("programs_kept")
OPTIONS = {"optimizer__ema": 0.9}  # and dropout, which is in the tiny model


def run(folder):
    return train.train(tiny.config(**OPTIONS), folder, "tiny.py")


def start(folder, kill=0):
    """The same run as a process; killed at its kill-th batch if kill."""
    flags = [f"--config={tiny.__file__}", f"--workdir={folder}", "--config.optimizer.ema=0.9"]
    return subprocess.run(
        [sys.executable, "-m", "tests.experiments.tiny", *flags],
        cwd=ROOT,
        env={**os.environ, "TINY_KILL": str(kill)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, programs_kept):
    folder = tmp_path_factory.mktemp("unbroken")
    assert run(folder) == 0
    return folder


def results(folder):
    """All that a run says of itself but for times."""
    summary = read_json(folder / "summary.json")
    timed = ("seconds", "steps_per_second", "examples_per_second")
    metrics = [{k: v for k, v in line.items() if k not in timed} for line in read_lines(folder / "metrics.jsonl")]
    return {"metrics": metrics, **{k: summary[k] for k in ("param_hash", "best", "final", "steps", "config_hash")}}


def stop_at(monkeypatch, count, number=signal.SIGTERM):
    """Sends this process a signal when the count-th batch is about to be placed."""
    put, seen = Program.put, []

    def counted(self, batch):
        seen.append(None)
        if len(seen) == count:
            os.kill(os.getpid(), number)
        return put(self, batch)

    monkeypatch.setattr(Program, "put", counted)


# in a step; at a step where an evaluation is due; in that evaluation; in the test
@pytest.mark.parametrize("batch", [4, 6, 8, PLACED - 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_resumes(tmp_path, monkeypatch, capsys, unbroken, batch, number):
    stop_at(monkeypatch, batch, number)
    assert run(tmp_path) == 128 + number
    monkeypatch.undo()
    assert "saved; the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "summary.json").exists()
    latest = Checkpoints(tmp_path / "checkpoints").latest()
    assert latest == {4: 4, 6: 6, 8: 6}.get(batch, 24)
    assert run(tmp_path) == 0
    assert results(tmp_path) == results(unbroken)
    assert [r["step"] for r in read_lines(tmp_path / "ledger.jsonl") if r["event"] == "resume"] == [latest]


def test_handlers_are_put_back(tmp_path, unbroken):
    before = signal.getsignal(signal.SIGTERM)
    assert run(unbroken) == 0
    assert signal.getsignal(signal.SIGTERM) is before


def killed_and_resumed(folder, unbroken, kill):
    assert start(folder, kill).returncode == -signal.SIGKILL
    assert run(folder) == 0
    assert results(folder) == results(unbroken)


@pytest.mark.parametrize("kill", [15, 27])
def test_sigkill_resumes(tmp_path, unbroken, kill):
    """Also holds a process equal to a run in this one."""
    killed_and_resumed(tmp_path, unbroken, kill)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(10))
def test_ten_out_of_ten(tmp_path, unbroken, trial):
    killed_and_resumed(tmp_path, unbroken, random.Random(trial).randrange(1, PLACED))


@quiet_uvloop
def test_damaged_checkpoint_is_passed_over(tmp_path, monkeypatch, caplog, unbroken):
    stop_at(monkeypatch, 20)
    run(tmp_path)
    monkeypatch.undo()
    steps = Checkpoints(tmp_path / "checkpoints").steps()
    damage(tmp_path / "checkpoints", steps[-1])
    caplog.set_level("INFO", "archloom")
    assert run(tmp_path) == 0
    assert f"checkpoint {steps[-1]} passed over" in caplog.text
    assert f"going on from step {steps[-2]}" in caplog.text
    assert results(tmp_path) == results(unbroken)


@quiet_uvloop
def test_damaged_steps_are_deleted_once_passed_over(tmp_path, programs):
    program, checkpoints = programs(tiny.config()), Checkpoints(tmp_path / "checkpoints", keep=9)
    for step in (4, 8, 12):
        checkpoints.save(step, program.init(), {})
    checkpoints.wait()
    damage(tmp_path / "checkpoints", 8)
    damage(tmp_path / "checkpoints", 12)
    _, step, _ = train.restore(program, checkpoints, Ledger(tmp_path))
    assert step == 4
    assert checkpoints.steps() == [4]
