"""Stands in for experiments.train: same folder, same files, no JAX. What it does is said by --config.fake.*.

It "trains" config.train.steps steps of 20 ms, goes on from its last step, and writes summary.json at the end, once.
DIR/../../done.txt gets one line for every job that reached its end.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

stopped = []


def main(argv: list[str]) -> int:
    options = dict(word.removeprefix("--").split("=", 1) for word in argv)
    folder, seed, steps = Path(options["workdir"]), int(options["config.seed"]), int(options["config.train.steps"])
    fail, arg = options.get("config.fake.fail", ""), options["config"].partition(":")[2]
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    config = {"seed": seed, "train": {"steps": steps}, "task": {"name": "listops"}}
    write(folder / "config.json", {"config": config, "hash": "h" + arg, "seed": seed, "source": options["config"]})
    checkpoint = folder / "step.txt"
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    if fail == "early":
        print("config.fake.fail: told to", file=sys.stderr)
        return 2
    while step < steps:
        time.sleep(0.02)
        step += 1
        record = {"step": step, "split": "train", "loss": 1 / step, "accuracy": 0.1, "seconds": step / 50}
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({**record, "steps_per_second": 50.0}) + "\n")
        write(checkpoint, step)
        if fail == "killed" and step == 2 and not (folder / "was-killed").exists():
            (folder / "was-killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if stopped:
            print("saved", flush=True)
            return 0
    if fail == "late" and not Path(folder.parent.parent, "repaired").exists():
        write(folder / "summary.json", {"status": "failed", "reason": f"loss is nan at step {step}"})
        return 1
    with open(folder / "summary-writes.txt", "a") as file:
        file.write(f"{os.getpid()}\n")
    write(folder / "summary.json", {"status": "done", "reason": None, "best": {"accuracy": 0.5}, "steps": step})
    return 0


def write(file: Path, value: object) -> None:
    new = file.with_suffix(".new")
    new.write_text(json.dumps(value))
    os.replace(new, file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
