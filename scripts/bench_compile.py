"""Seconds to compile a train step against depth, with the layers written out and as one loop (model.scan), in one run.

    python scripts/bench_compile.py [--config=configs/synthetic/listops.py:softmax] [--depths 4 24] [--rounds 3]

Each case is built and its train step traced, lowered and compiled, without a cache on disk or in memory; the cases take
turns and the medians over rounds are shown. The claim: as one loop 24 layers take at most 1.5 times as long as 4.
Appends to results/compile.jsonl.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments import cli, environment  # noqa: E402
from experiments import config as configs  # noqa: E402
from experiments.program import Program  # noqa: E402

BACKEND = "/jax/core/compile/backend_compile_duration"


def compile_once(config, seconds: list[float]) -> dict[str, float]:
    """Seconds to build the program, and to trace, lower and compile its train step; `seconds` hears the compiler's."""
    jax.clear_caches()
    start = time.perf_counter()
    program = Program(config)
    built = time.perf_counter()
    seconds.clear()
    with jax.set_mesh(program.mesh):
        program.train_step  # noqa: B018  compiles when first read
    done = time.perf_counter()
    return {"build": built - start, "trace": done - built - sum(seconds), "compile": sum(seconds), "step": done - built}


def main(argv: list[str]) -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 24])
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_known_args(argv)[0]
    source, overrides, _ = configs.split(argv, parser, required=False)
    source = source or "configs/synthetic/listops.py:softmax"
    jax.config.update("jax_enable_compilation_cache", False)
    seconds: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: seconds.append(duration) if event == BACKEND else None
    )
    cases = {
        (scan, depth): configs.configure(source, {**overrides, "model.depth": depth, "model.scan": scan})
        for scan in (True, False)
        for depth in flags.depths
    }
    compile_once(cases[True, flags.depths[0]], seconds)  # warms up the compiler itself
    times = {case: [] for case in cases}
    for _ in range(flags.rounds):
        for case, config in cases.items():
            times[case].append(compile_once(config, seconds))
    medians = {
        case: {key: statistics.median(found[key] for found in all_of_it) for key in all_of_it[0]}
        for case, all_of_it in times.items()
    }
    few, many = min(flags.depths), max(flags.depths)
    ratio = {
        name: medians[scan, many]["step"] / medians[scan, few]["step"]
        for name, scan in (("scan", True), ("written_out", False))
    }
    record = {
        "ratio": ratio,  # of the deepest to the shallowest
        "depths": [few, many],
        "rows": [
            {"scan": scan, "depth": depth, **found, "rounds": [each["step"] for each in times[scan, depth]]}
            for (scan, depth), found in medians.items()
        ],
        "config": source,
        "load_average": os.getloadavg()[0],  # more than 1 + the cores in use: others were at work
        **environment.describe(),
    }
    results = ROOT / "results" / "compile.jsonl"
    results.parent.mkdir(exist_ok=True)
    with open(results, "a") as file:
        file.write(json.dumps(record) + "\n")
    print(
        f"{source}: train step, seconds (medians of {flags.rounds})\n{'':12}  depth   build   trace  compile   in all"
    )
    for (scan, depth), found in medians.items():
        name = "one loop" if scan else "written out"
        print(
            f"{name:12}{depth:7}{found['build']:8.2f}{found['trace']:8.2f}{found['compile']:9.2f}{found['step']:9.2f}"
        )
    print(f"{many} layers over {few}: {ratio['scan']:.2f} as one loop, {ratio['written_out']:.2f} written out")
    return 0


if __name__ == "__main__":
    environment.quiet()
    sys.exit(cli.command(main)(None))
