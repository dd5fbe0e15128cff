"""Runs the sweep of a config file in local worker processes, each job exactly once however often it is killed.

    python -m experiments.sweep --config=configs/quickstart.py --workdir=DIR [--workers=1] [--retry-failed] [--list]

    DIR/sweep.db     the ledger (Optuna, SQLite): one trial a job
    DIR/sweep.lock   held by the one sweep that runs here
    DIR/jobs/NAME    run folder of a job, with log.txt and worker.lock, which is held as long as its worker lives

The truth about a job is its folder: summary.json is written once, at the end. The ledger is brought up to date from the
folders at every start, so it does not matter at which instant the last sweep, or a worker, was killed; the trainer goes
on from its checkpoint. Exit code: 0 all done, 1 some failed or were interrupted, 2 nothing was started, 128 + signal.
"""

import fcntl
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from arch.errors import ConfigError
from experiments import runs
from experiments.cli import Parser, command
from experiments.sweeping import worker
from experiments.sweeping.display import Display, State
from experiments.sweeping.jobs import Job, definition_text, difference, read_in_child
from experiments.sweeping.ledger import Ledger

TRAINER = (sys.executable, "-m", "experiments.train")
STOPPED = (0, 130, 143)  # exit codes of a worker that was asked to stop and saved: no summary, to be taken up again
POLL = 0.1  # seconds


class Sweep:
    """The loop over jobs. `states` is what the display shows."""

    def __init__(self, jobs: Sequence[Job], ledger: Ledger, folder: Path, trainer: Sequence[str], workers: int):
        self.ledger, self.folder, self.trainer, self.workers = ledger, folder, trainer, workers
        self.jobs = {job.number: job for job in jobs}
        self.states = {job.number: State(job, folder / "jobs" / job.name) for job in jobs}
        self.running: dict[int, subprocess.Popen] = {}
        self.orphans: set[int] = set()  # workers of a killed sweep that have not ended yet
        self.signal = 0

    def recover(self, retry_failed: bool) -> None:
        """Brings the ledger in line with the folders."""
        for number, entry in self.ledger.entries().items():
            path = self.states[number].folder
            if worker.is_running(path):
                self.orphans.add(number)
                self._show(number, "orphan")
            elif entry.state == "FAIL" and retry_failed:
                if (path / "summary.json").exists():
                    (path / "summary.json").rename(path / f"summary-attempt{entry.attempt}.json")
                self.ledger.retry(number)
                self._show(number, "waiting")
            elif entry.state == "FAIL":
                self._show(number, "failed", entry.reason or "")
            elif entry.state == "COMPLETE" and runs.read_summary(path) is None:
                self._show(number, "failed", f"done in the ledger, but {path} has no summary.json; restore the folder")
            elif entry.state == "COMPLETE":
                self._show(number, "done")
            else:
                self._settle(number)

    def run(self, show: Callable[[], None]) -> None:
        """Starts, watches and settles workers until nothing is left to do or a signal came."""
        while True:
            self._collect()
            waiting = [number for number, state in self.states.items() if state.state == "waiting"]
            free = self.workers - len(self.running) - len(self.orphans)
            for number in waiting[: max(0, free)]:
                if not self.signal:
                    self._start(number)
            show()
            if not self.running and (self.signal or not (self.orphans or waiting)):
                return
            time.sleep(POLL)

    def stop(self, number: int, _frame: object = None) -> None:
        """On a signal: the workers save and end; on a second one they are killed."""
        for process in self.running.values():
            process.kill() if self.signal else process.terminate()
        self.signal = self.signal or number

    def _start(self, number: int) -> None:
        path = self.states[number].folder
        self.ledger.start(number)
        process = worker.start([*self.trainer, *self.jobs[number].argv, f"--workdir={path}"], path)
        if process is None:
            self.orphans.add(number)
            self._show(number, "orphan")
            return
        self.running[number] = process
        self._show(number, "running")
        if self.signal:  # it came while the process started
            process.terminate()

    def _collect(self) -> None:
        for number, process in list(self.running.items()):
            if process.poll() is not None:
                del self.running[number]
                self._settle(number, process.returncode)
        for number in [number for number in self.orphans if not worker.is_running(self.states[number].folder)]:
            self.orphans.discard(number)
            self._settle(number)

    def _settle(self, number: int, code: int | None = None) -> None:
        """Writes into the ledger what the folder of a job without a worker says; code is its worker's exit code."""
        state, job = self.states[number], self.jobs[number]
        summary = runs.read_summary(state.folder)
        if summary is not None and summary["status"] == "done":
            best = summary.get("best") or {}
            value = best.get("accuracy", -best["loss"] if "loss" in best else 0.0)  # the ledger's study maximises
            self.ledger.complete(number, value if math.isfinite(value) else 0.0)
            self._show(number, "done")
        elif summary is not None or (code is not None and code > 0 and code not in STOPPED):
            reason = (summary or {}).get("reason") or f"the worker ended with exit code {code}"
            self.ledger.fail(number, reason)
            self._show(number, "failed", reason)
        else:
            self.ledger.wait(number)
            if code is None:
                self._show(number, "waiting")
            else:
                how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
                self._show(number, "interrupted", "" if self.signal else f"{job.name} ended {how} before it was done")

    def _show(self, number: int, state: str, reason: str = "") -> None:
        self.states[number].state, self.states[number].reason = state, reason


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Holds DIR/sweep.lock. A POSIX lock: workers do not inherit it, and the kernel drops it with this process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "sweep.lock", "ab") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            problem = f"another sweep is running in {folder}; wait for it, or use another folder"
            raise ConfigError("--workdir", problem) from None
        yield


def open_ledger(folder: Path, jobs: Sequence[Job]) -> Ledger:
    """The ledger of the folder, made if there is none; a changed definition is refused with the difference."""
    file = folder / "sweep.db"
    if not file.exists():
        return Ledger.create(file, jobs)
    ledger = Ledger(file)
    if ledger.definition != definition_text(jobs):
        print(difference(ledger.definition, definition_text(jobs)), file=sys.stderr)
        problem = f"the sweep differs from the one begun in {folder} (above); undo the change or use another --workdir"
        raise ConfigError("get_sweep", problem)
    return ledger


def main(
    argv: Sequence[str],
    trainer: Sequence[str] = TRAINER,
    read_jobs: Callable[[str, Sequence[str]], list[Job]] = read_in_child,
) -> int:
    parser = Parser(prog="python -m experiments.sweep", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", required=True, help="config file with get_sweep()")
    parser.add_argument("--workdir", required=True, type=Path, help="ledger and run folders; the same to go on")
    parser.add_argument("--workers", type=int, default=1, help="jobs at a time (default 1)")
    parser.add_argument("--retry-failed", action="store_true", help="run failed jobs again")
    parser.add_argument("--list", action="store_true", help="show the jobs and their states, run nothing")
    flags, rest = parser.parse_known_args(argv)
    for word in rest:
        if not word.startswith("--config.") or "=" not in word:
            raise ConfigError("command line", f"unknown flag {word!r}; overrides are --config.path=value")
    if flags.workers < 1:
        raise ConfigError("--workers", f"must be at least 1, not {flags.workers}")
    jobs = read_jobs(flags.config, rest)
    if flags.list:
        return _list(jobs, flags.workdir, trainer)
    with only_one(flags.workdir):
        sweep = Sweep(jobs, open_ledger(flags.workdir, jobs), flags.workdir, trainer, flags.workers)
        sweep.recover(flags.retry_failed)
        before = {
            number: signal.signal(number, sweep.stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        try:
            with Display(sweep.states.values(), flags.workers) as display:
                sweep.run(display.update)
                display.finish()
        except BaseException:
            sweep.stop(signal.SIGTERM)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if sweep.signal:
            return 128 + sweep.signal
        return 0 if all(state.state == "done" for state in sweep.states.values()) else 1


def _list(jobs: Sequence[Job], folder: Path, trainer: Sequence[str]) -> int:
    states = {job.number: State(job, folder / "jobs" / job.name) for job in jobs}
    if (folder / "sweep.db").exists():
        for number, entry in open_ledger(folder, jobs).entries().items():
            word = {"COMPLETE": "done", "FAIL": "failed"}.get(entry.state, "waiting")
            state = states[number]
            state.state, state.reason = "running" if worker.is_running(state.folder) else word, entry.reason or ""
    Display(states.values(), 1).show()
    return 0


run = command(main)  # tests inject a trainer and a reader of jobs


if __name__ == "__main__":
    sys.exit(run())
