"""A sweep of the fake trainer as a process that a test can kill: python fake_sweep.py JOBS.json --workdir=DIR ..."""

import json
import sys
from pathlib import Path

from experiments import sweep
from experiments.sweeping.jobs import Job

TRAINER = (sys.executable, str(Path(__file__).with_name("fake_trainer.py")))


def job(number: int, arg: str, seed: int = 0, steps: int = 15, fail: str = "") -> Job:
    overrides = {"arg": arg, "seed": seed, "train.steps": steps, "fake.fail": fail}
    argv = [f"--config=fake.py:{arg}", *(f"--config.{key}={value}" for key, value in overrides.items() if key != "arg")]
    return Job(number, overrides, tuple(argv), {"seed": seed, "train": {"steps": steps}, "fake": fail}, f"h{arg}")


def read_jobs(file: str, common=()) -> list[Job]:
    return [job(number, *one) for number, one in enumerate(json.loads(Path(file).read_text()), 1)]


def run(file: Path, folder: Path, *flags: str) -> int:
    return sweep.run([f"--config={file}", f"--workdir={folder}", *flags], TRAINER, read_jobs)


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))
