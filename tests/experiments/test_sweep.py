"""A sweep ends with every job done exactly once, whatever is killed, and says what went wrong."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

from experiments.sweeping import worker
from experiments.sweeping.ledger import Ledger
from tests.experiments import fake_sweep

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path):
    """Writes the definition; the folder is beside it."""

    def write(*jobs):
        (tmp_path / "jobs.json").write_text(json.dumps(jobs))
        return tmp_path / "jobs.json", tmp_path / "sweep"

    return write


def start(file, folder, *flags) -> subprocess.Popen:
    command = [sys.executable, fake_sweep.__file__, file, folder, *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.02)


def states(folder) -> list[str]:
    return [entry.state for _, entry in sorted(Ledger(folder / "sweep.db").entries().items())]


def endings(folder) -> list[int]:
    """How often each job reached its end."""
    return [len((job / "summary-writes.txt").read_text().split()) for job in sorted((folder / "jobs").iterdir())]


def test_runs_every_job_once_and_again_does_nothing(place, capsys):
    file, folder = place(("a", 0, 3), ("a", 1, 3), ("b", 0, 3))
    assert fake_sweep.run(file, folder, "--workers=2") == 0
    assert states(folder) == ["COMPLETE"] * 3
    assert min(path.name for path in (folder / "jobs").iterdir()).startswith("001-a-")
    assert fake_sweep.run(file, folder) == 0
    assert endings(folder) == [1, 1, 1]
    assert "3 done" in capsys.readouterr().out


def test_ledger_is_an_optuna_study_with_a_trial_a_job(place):
    file, folder = place(("a", 0, 1), ("b", 1, 1))
    fake_sweep.run(file, folder)
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder / 'sweep.db'}")
    assert [trial.params["arg"] for trial in study.trials] == ["a", "b"]
    assert [trial.value for trial in study.trials] == [0.5, 0.5]


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_instants_every_job_ends_done_exactly_once(place, seed):
    rng = random.Random(seed)
    file, folder = place(*[("abc"[n % 3], n, 15) for n in range(4)])
    for _ in range(5):
        process = start(file, folder, "--workers=2")
        time.sleep(rng.uniform(0.1, 1.3))
        process.kill()
        process.wait()
    process = start(file, folder, "--workers=2")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert states(folder) == ["COMPLETE"] * 4
    assert endings(folder) == [1] * 4


def test_worker_of_a_killed_sweep_saves_and_is_not_started_twice(place):
    file, folder = place(("a", 0, 40))
    process = start(file, folder)
    wait_for(lambda: list((folder / "jobs").glob("*/step.txt")))
    process.kill()
    process.wait()
    (job,) = (folder / "jobs").iterdir()
    wait_for(lambda: not worker.is_running(job))
    assert (job / "log.txt").read_text() == "saved\n"
    assert int((job / "step.txt").read_text()) < 40
    assert fake_sweep.run(file, folder) == 0
    steps = [json.loads(line)["step"] for line in (job / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41)), "went on from its checkpoint, no step twice"


def test_waits_for_a_worker_that_outlived_its_sweep(place, capsys):
    """One that holds worker.lock is left alone; here a process that ignores SIGTERM for a while."""
    file, folder = place(("a", 0, 2))
    path = folder / "jobs" / fake_sweep.job(1, "a", 0, 2).name
    orphan = worker.start([sys.executable, "-c", "import time; time.sleep(1)"], path)
    assert worker.start([sys.executable, "-c", ""], path) is None
    begun = time.monotonic()
    assert fake_sweep.run(file, folder) == 0
    assert time.monotonic() - begun > 0.5
    assert orphan.wait() == 0
    assert endings(folder) == [1]


def test_second_sweep_on_the_same_folder_is_refused(place):
    file, folder = place(("a", 0, 30))
    first = start(file, folder)
    wait_for(lambda: list(folder.glob("jobs/*/step.txt")))
    second = start(file, folder)
    output, _ = second.communicate(timeout=30)
    assert second.returncode == 2
    assert output == f"--workdir: another sweep is running in {folder}; wait for it, or use another folder\n"
    assert first.wait(timeout=30) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_lets_the_workers_save(place, number):
    file, folder = place(("a", 0, 60), ("b", 0, 60))
    process = start(file, folder, "--workers=1")
    wait_for(lambda: list(folder.glob("jobs/*/step.txt")))
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert states(folder) == ["WAITING", "WAITING"]
    (job,) = (folder / "jobs").iterdir()
    assert (job / "log.txt").read_text() == "saved\n"


def test_failures_are_shown_with_reason_and_last_line_and_retried_on_request(place, capsys):
    file, folder = place(("a", 0, 2), ("b", 0, 2, "early"), ("c", 0, 2, "late"))
    assert fake_sweep.run(file, folder) == 1
    assert states(folder) == ["COMPLETE", "FAIL", "FAIL"]
    out = capsys.readouterr().out
    assert "the worker ended with exit code 2" in out
    assert "config.fake.fail: told to" in out
    assert "loss is nan at step 2" in out
    assert fake_sweep.run(file, folder) == 1, "not run again unasked"
    assert Ledger(folder / "sweep.db").entries()[3].attempt == 1
    (folder / "repaired").touch()
    assert fake_sweep.run(file, folder, "--retry-failed") == 1
    entries = Ledger(folder / "sweep.db").entries()
    assert [entries[n].state for n in (1, 2, 3)] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert entries[3].attempt == 2
    assert len(list(folder.glob("jobs/003-*/summary-attempt1.json"))) == 1


def test_worker_killed_by_a_signal_goes_on_next_time(place, capsys):
    file, folder = place(("a", 0, 4, "killed"))
    assert fake_sweep.run(file, folder) == 1
    assert "SIGKILL" in capsys.readouterr().out
    assert states(folder) == ["WAITING"]
    assert fake_sweep.run(file, folder) == 0
    assert endings(folder) == [1]


def test_changed_definition_is_refused_with_a_diff(place, capsys):
    file, folder = place(("a", 0, 2), ("b", 0, 2))
    assert fake_sweep.run(file, folder) == 0
    place(("a", 0, 2), ("b", 0, 3))
    assert fake_sweep.run(file, folder) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[:2] == ["--- job 2 in the ledger", "+++ job 2 now"]
    assert {"-config.train.steps = 2", "+config.train.steps = 3"} < set(err)
    assert "undo the change or use another --workdir" in err[-1]


def test_list_runs_nothing(place, capsys):
    file, folder = place(("a", 0, 2), ("b", 0, 2))
    assert fake_sweep.run(file, folder, "--list") == 0
    assert not folder.exists()
    out = capsys.readouterr().out
    assert "2 waiting" in out


def test_half_made_ledger_is_made_anew(place):
    file, folder = place(("a", 0, 1))
    folder.mkdir()
    (folder / "sweep.db.new").write_bytes(b"half a database")
    assert fake_sweep.run(file, folder) == 0


def test_start_needs_no_jax():
    code = "import sys, experiments.sweep, experiments.tables; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
