"""Metrics, ledger, stopwatch and progress."""

import io
import json
import time

import pytest

from experiments.files import read_lines, write_json
from experiments.metrics import Ledger, Metrics, Progress, Stopwatch, Window, clock


def rows(path):
    return list(read_lines(path))


def test_a_step_appears_once_after_a_resume(tmp_path):
    metrics = Metrics(tmp_path)
    for step in (10, 20, 30):
        metrics.write(step, "train", loss=1.0 / step)
    metrics.write(20, "validation", loss=0.1)
    metrics.write(30, "test", loss=0.1)
    metrics.close()
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 40, "spl')  # killed in the middle of a line
    metrics = Metrics(tmp_path, resumed=20)
    metrics.write(30, "train", loss=0.5)
    metrics.close()
    got = [(r["step"], r["split"], r["loss"]) for r in rows(tmp_path / "metrics.jsonl")]
    assert got == [(10, "train", 0.1), (20, "train", 0.05), (20, "validation", 0.1), (30, "train", 0.5)]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_ledger_adds_up_over_attempts(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.write("train", 5, 1.5, steps=5)
    with ledger.timed("evaluate", 5):
        time.sleep(0.01)
    ledger.close()
    (tmp_path / "ledger.jsonl").open("a").write('{"event"')
    ledger = Ledger(tmp_path)
    ledger.write("train", 9, 0.5)
    ledger.close()
    assert ledger.totals["train"] == 2.0
    assert 0.01 <= ledger.totals["evaluate"] < 0.5
    assert [r["event"] for r in rows(tmp_path / "ledger.jsonl")] == ["train", "evaluate", "train"]


def test_stopwatch_tells_data_from_training(tmp_path):
    ledger = Ledger(tmp_path)
    watch = Stopwatch(ledger, total=10.0)
    with watch.waiting():
        time.sleep(0.03)
    time.sleep(0.02)
    watch.pause(1)
    time.sleep(0.05)  # an evaluation: not training
    total = watch.total
    watch.pause(1)  # books nothing twice
    data, train = rows(tmp_path / "ledger.jsonl")
    assert (data["event"], train["event"], data["steps"]) == ("data", "train", 1)
    assert 0.03 <= data["seconds"] < 0.05
    assert 0.02 <= train["seconds"] < 0.05
    assert total == watch.total == pytest.approx(10 + data["seconds"] + train["seconds"], abs=1e-5)


def row(loss, ok=1.0):
    return {"loss": loss, "accuracy": 0.5, "grad_norm": 2.0, "learning_rate": 0.1, "ok": ok}


def test_window_averages_finite_steps_and_survives_a_checkpoint():
    window = Window()
    for r in (row(1.0), row(float("nan"), ok=0.0)):
        window.add(r)
    window = Window(json.loads(json.dumps(window.state)))
    window.add(row(3.0))
    line = window.line(row(3.0), seconds=6.0, batch_size=4)
    assert (line["loss"], line["grad_norm"], line["learning_rate"]) == (2.0, 2.0, 0.1)
    assert (line["steps_per_second"], line["examples_per_second"]) == (0.5, 2.0)
    window.add(row(float("nan"), ok=0.0))
    assert window.line(row(1.0), seconds=7.0, batch_size=4)["loss"] is None


class Terminal(io.StringIO):
    def isatty(self):
        return True


LINE = {"loss": 1.25, "accuracy": 0.5, "examples_per_second": 200.0, "steps_per_second": 2.0}


def test_plain_lines_are_few():
    stream = io.StringIO()
    progress = Progress(100, every=60, stream=stream)
    for step in range(10, 110, 10):
        progress.update(step, LINE)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines == [
        "step 10/100  loss 1.2500  accuracy 0.5000  200 examples/s  ETA 0:45",
        "step 100/100  loss 1.2500  accuracy 0.5000  200 examples/s  ETA 0:00",
    ]


def test_live_display_in_a_terminal():
    stream = Terminal()
    progress = Progress(100, stream=stream)
    progress.update(10, LINE)
    progress.update(20, {**LINE, "loss": None})
    progress.say("validation [0.5]")
    progress.close()
    for text in ("20/100", "loss is not finite", "200 examples/s", "ETA 0:40", "validation [0.5]"):
        assert text in stream.getvalue()


def test_clock():
    assert [clock(s) for s in (4.6, 75, 3700)] == ["0:05", "1:15", "1:01:40"]


def test_json_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
