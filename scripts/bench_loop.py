"""Steps per second of the trainer against the bare jitted step, in one run.

    python scripts/bench_loop.py [--config=configs/quickstart.py:linear] [--rounds 5] [--steps 40]

The bare step is the same compiled program called in a loop on one batch that lies on the device, and waited for at the
end. The trainer is experiments.train itself, with its data pipeline, metrics, progress and signal handling; its rate is
that of the stretches it books as data and train (evaluation and checkpoints are booked apart). The two take turns and
the ratio is the median over rounds. Appends to results/bench_loop.jsonl.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments import cli, environment, train  # noqa: E402
from experiments import config as configs  # noqa: E402
from experiments.files import read_json  # noqa: E402
from experiments.program import Program  # noqa: E402


def bare(program: Program, steps: int) -> float:
    """Steps per second of the compiled step alone."""
    batches = program.batches()
    batch = program.put(next(batches))
    batches.close()
    state, _ = program.train_step(program.init(), batch)
    jax.block_until_ready(state)
    start = time.perf_counter()
    for _ in range(steps):
        state, values = program.train_step(state, batch)
    jax.block_until_ready((state, values))
    return steps / (time.perf_counter() - start)


def loop(config, source: str) -> float:
    """Steps per second of the trainer, from its summary."""
    with tempfile.TemporaryDirectory() as folder:
        if train.train(config, Path(folder), source):
            raise SystemExit("the run failed")
        return read_json(Path(folder) / "summary.json")["steps_per_second"]


def main(argv: list[str]) -> int:
    environment.compile_cache()
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    flags = parser.parse_known_args(argv)[0]
    source, overrides, _ = configs.split(argv, parser, required=False)
    source = source or "configs/quickstart.py:linear"
    every = {"train.steps": flags.steps, "train.eval_every": flags.steps, "optimizer.schedule.warmup": 1}
    config = configs.configure(source, {**every, **overrides})
    program = Program(config)
    program.task.prepare()
    train.Program = lambda _: program  # one compiled program for both
    rounds = []
    with jax.set_mesh(program.mesh):
        bare(program, 3)
        for _ in range(flags.rounds):
            before, inside, after = bare(program, flags.steps), loop(config, source), bare(program, flags.steps)
            rounds.append({"bare": (before + after) / 2, "loop": inside, "ratio": 2 * inside / (before + after)})
    record = {
        "ratio": statistics.median(r["ratio"] for r in rounds),
        "rounds": rounds,
        "config": source,
        "config_hash": configs.config_hash(config),
        "steps": flags.steps,
        "load_average": os.getloadavg()[0],  # more than 1 + the cores in use: others were at work
        **{key: value for key, value in environment.describe().items() if key != "command"},
    }
    results = ROOT / "results" / "bench_loop.jsonl"
    results.parent.mkdir(exist_ok=True)
    with open(results, "a") as file:
        file.write(json.dumps(record) + "\n")
    median = {key: statistics.median(r[key] for r in rounds) for key in ("bare", "loop")}
    print(f"bare step {median['bare']:.2f} steps/s, trainer {median['loop']:.2f} steps/s, ratio {record['ratio']:.3f}")
    return 0


if __name__ == "__main__":
    environment.quiet()
    environment.keep_memory()
    sys.exit(cli.command(main)(None))
