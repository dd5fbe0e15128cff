"""Searches the tile options of an op's kernels: by static schedule for a TPU, by time on the GPU or CPU at hand.

    python scripts/tune_kernel.py OP [--generations v5e v6e ...] [--case TEXT] [--forward | --backward]
                                     [--set OPTION=VALUE ...]
    python scripts/tune_kernel.py OP --time [--case TEXT]

Compiles every combination of the options of the op's cases (scripts/tpu_cases/<op>.py) and prints them in order of the
cycles that bind: the schedule's, or those of the bytes if they are more. --set chunk=128,256 tries these values instead
of the case's. --time runs the cases of scripts/gpu_cases/<op>.py that have options on the device at hand, the median of
rounds. The best of each goes to results/kernels/tune.jsonl, which kernels_pallas/<op>/tiles.py cites.
"""

import argparse
import ast
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import statistics
import sys
from typing import Any

import tpu_compile
import tpu_schedule

sys.path.insert(0, str(tpu_compile.ROOT))  # run from a source tree that is not installed

RECORD = tpu_compile.ROOT / "results" / "kernels" / "tune.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", metavar="OP", choices=tpu_compile.ops(), help=f"of {', '.join(tpu_compile.ops())}")
    parser.add_argument("--generations", nargs="+", default=["v5e", "v6e"], choices=sorted(tpu_schedule.CHIPS))
    parser.add_argument("--case", default="", help="only cases whose name holds this text")
    parser.add_argument("--forward", action="store_true", help="the forward pass alone")
    parser.add_argument("--backward", action="store_true", help="the backward pass alone")
    parser.add_argument("--set", nargs="+", default=[], metavar="OPTION=VALUE", help="values to try")
    parser.add_argument("--time", action="store_true", help="run on this machine's device instead")
    parser.add_argument("--tiny", action="store_true", help="with --time: small shapes, nothing recorded")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    options = parser.parse_args()
    fixed = {key: ast.literal_eval(value) for key, value in (item.split("=", 1) for item in options.set)}
    passes = [p for p in tpu_compile.PASSES if getattr(options, p)] or list(tpu_compile.PASSES)
    if options.time:
        return by_time(parser, options)
    cases = [case for case in tpu_compile.cases(options.op) if options.case in case.name and case.options]
    if not cases:
        parser.error(f"no case of {options.op} with options holds {options.case!r}")
    if reason := tpu_compile.missing():
        print(f"tune_kernel: {reason}", file=sys.stderr)
        return 2
    jobs = [
        tpu_schedule.job(options.op, generation, case.name, [which], combinations(case, fixed))
        for case in cases
        for generation in options.generations
        for which in passes
        if which == "forward" or case.backward
    ]
    found: dict[str, list[dict[str, Any]]] = {}
    counts = {job_key(job): len(job["options"]) for job in jobs}
    for result in tpu_schedule.run(jobs, options.jobs):
        if "options" not in result:
            print(f"tune_kernel: {tpu_schedule.key(result)}: {result['error']}", file=sys.stderr)
            continue
        rows = found.setdefault(tpu_schedule.key(result), [])
        rows.append(result)
        if len(rows) == counts[tpu_schedule.key(result)]:
            report(rows)
    return 0


def by_time(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    module = importlib.import_module(f"gpu_cases.{options.op}")
    cases = [case for case in module.CASES if options.case in case.name and case.tune]
    if not cases:
        parser.error(f"no case of scripts/gpu_cases/{options.op}.py that holds {options.case!r} has options to tune")
    for case in cases:
        report(timed(options.op, case, options.tiny), record=not options.tiny)
    return 0


def job_key(job: dict[str, Any]) -> str:
    return tpu_schedule.key({**job, "pass": job["passes"][0]})


def combinations(case: Any, fixed: dict[str, Any]) -> list[dict[str, Any]]:
    values = [fixed.get(key, case.options[key]) for key in case.options]
    values = [value if isinstance(value, (tuple, list)) else (value,) for value in values]
    return [dict(zip(case.options, chosen)) for chosen in itertools.product(*values)]


def cost(row: dict[str, Any]) -> float:
    return row["milliseconds"] if "milliseconds" in row else max(row["bundles"], row["bytes_floor"])


def report(rows: list[dict[str, Any]], record: bool = True) -> None:
    """Prints a case's combinations, the best first, and records them."""
    ran = sorted((row for row in rows if "error" not in row), key=lambda row: (cost(row), row.get("bundles", 0)))
    print(tpu_schedule.key(rows[0]), flush=True)
    for row in ran:
        what = f"{row['milliseconds']:.3f} ms" if "milliseconds" in row else f"{row['bundles']:.3f} bundles"
        print(f"  {what:20} {words(row['options'])}", flush=True)
    refused = [row for row in rows if "error" in row]
    for row in refused:
        print(f"  {'refused':20} {words(row['options'])}: {row['error'][:160]}", flush=True)
    if not ran or not record:
        return
    keep = ("op", "case", "generation", "pass")
    figure = "milliseconds" if "milliseconds" in ran[0] else "bundles"
    line = {
        **{name: rows[0][name] for name in keep},
        "best": ran[0]["options"],
        figure: round(ran[0][figure], 4),
        "tried": [[*row["options"].values(), round(row[figure], 4)] for row in ran],
        "refused": len(refused),
        **provenance(),
    }
    if figure == "bundles":
        line["bytes_floor"] = round(ran[0]["bytes_floor"], 4)
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    with RECORD.open("a") as file:
        file.write(json.dumps(line) + "\n")


def words(options: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items())


def provenance() -> dict[str, Any]:
    from experiments.turns import origin

    names = [name for name in ("jax", "libtpu") if importlib.util.find_spec(name)]
    return {**origin(), "versions": {name: importlib.metadata.version(name) for name in names}}


def timed(op: str, case: Any, tiny: bool, rounds: int = 5) -> list[dict[str, Any]]:
    """Milliseconds of each combination on this machine's device."""
    import dataclasses

    import gpu_cases
    import jax

    side = next(iter(case.sides.values()))
    which = "backward" if case.backward else "forward"
    rows = []
    for chosen in itertools.product(*case.tune.values()):
        options = dict(zip(case.tune, chosen))
        row = {"op": op, "case": case.name, "generation": jax.devices()[0].device_kind, "pass": which}
        row["options"] = options
        try:
            measure, _ = gpu_cases.jax_timer(dataclasses.replace(case, options=options), side, tiny)
            row["milliseconds"] = statistics.median(measure() for _ in range(rounds))
        except NotImplementedError as refusal:
            row["error"] = str(refusal)
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
