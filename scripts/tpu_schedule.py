"""The static schedule of the TPU kernels, without a TPU: bundles per token, use of the matrix units, spills, bytes.

    python scripts/tpu_schedule.py [OP ...] [--generations v5e v6e ...] [--case TEXT] [--forward | --backward]
                                   [--set OPTION=VALUE ...] [--record | --check]

Compiles the cases of scripts/tpu_cases with the compiler in libtpu (the extra `aot`) and reads its dump. Of a kernel:
  bundles  cycles of the whole grid by the case's tokens x heads (or elements), a bundle a cycle, waits left out
  body     bundles of the loop over the grid, each once, and how often it turns; `whole` is the program, each once
  MXU      slots for matrix products in use; VALU those for vector arithmetic
  spill    registers written to memory for want of room, and read back, a bundle
A pass sums its kernels; a backward pass leaves out what the forward pass runs again for it (kernels called *_forward).
Beside it stands the floor of bytes: those the case must move over the bandwidth, as cycles. The larger of both binds.
--record writes the table results/kernels/tpu_schedule.json; --check compares with it and fails past 5 %.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tpu_compile
import tpu_dump

TABLE = tpu_compile.ROOT / "results" / "kernels" / "tpu_schedule.json"
GROWTH = 0.05  # of bundles, past which --check fails
# A device of each generation: bytes a second, from jax's own table (pltpu.get_tpu_info, of a TensorCore; a v5p device
# is two), and cycles a second: what its FLOP/s there are by 4 matrix units of 128 or 256 a side, 2 FLOP each.
CHIPS = {
    "v5e": (0.82e12, 1.50e9),
    "v5p": (2 * 1.23e12, 1.75e9),
    "v6e": (1.64e12, 1.75e9),
    "tpu7x": (3.7e12, 2.20e9),
}
COMPILING = "compiling "  # starts a line of a child's log, before what it compiles
RERUN = re.compile(r"_forward|_fwd|fwd_")  # kernels of the forward pass, by name, ours and the peers'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(tpu_compile.ops())}; all by default")
    parser.add_argument("--generations", nargs="+", default=["v5e", "v6e"], choices=sorted(CHIPS), metavar="NAME")
    parser.add_argument("--case", default="", help="only cases whose name holds this text")
    parser.add_argument("--forward", action="store_true", help="the forward pass alone")
    parser.add_argument("--backward", action="store_true", help="the backward pass alone")
    parser.add_argument("--set", nargs="+", default=[], metavar="OPTION=VALUE", help="tile options of the cases")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    parser.add_argument("--record", action="store_true", help=f"write {TABLE.relative_to(tpu_compile.ROOT)}")
    parser.add_argument("--check", action="store_true", help="compare with the table")
    options = parser.parse_args()
    if reason := tpu_compile.missing():
        print(f"tpu_schedule: {reason}", file=sys.stderr)
        return 2
    if unknown := sorted(set(options.ops) - set(tpu_compile.ops())):
        parser.error(f"no op {unknown[0]!r}; there are {', '.join(tpu_compile.ops())}")
    passes = [p for p in tpu_compile.PASSES if getattr(options, p)] or list(tpu_compile.PASSES)
    chosen = {key: ast.literal_eval(value) for key, value in (item.split("=", 1) for item in options.set)}
    ops = options.ops or [op for op in tpu_compile.ops() if op != "peers"]
    jobs = [job(op, generation, options.case, passes, [chosen]) for op in ops for generation in options.generations]
    found = []
    start = time.perf_counter()
    for result in run(jobs, options.jobs):
        print_result(result)
        found.append(result)
    print(f"{len(found)} passes in {time.perf_counter() - start:.0f} s")
    refused = [result for result in found if "error" in result]
    kept = [result for result in found if result.get("record", True)]
    print("".join(f"refused: {key(result)}\n" for result in refused), end="")
    failed = bool(refused)
    if options.record:
        record([result for result in kept if "error" not in result])
    if options.check:
        slower = compare(kept, json.loads(TABLE.read_text()))
        print("\n".join(slower) or f"none of {len(found)} passes grew by more than {GROWTH:.0%}")
        failed |= bool(slower)
    return int(failed)


def job(op: str, generation: str, case: str, passes: list[str], options: list[dict[str, Any]]) -> dict[str, Any]:
    return {"op": op, "generation": generation, "case": case, "passes": passes, "options": options}


def run(jobs: list[dict[str, Any]], at_once: int) -> Iterator[dict[str, Any]]:
    """Yields the results of jobs as they come, from a few processes: the compiler reads where to dump but once each."""
    lots = [jobs[n::at_once] for n in range(at_once)]
    children = [_Child(lot) for lot in lots if lot]
    try:
        while children:
            for child in list(children):
                yield from child.read()
                if child.done():
                    children.remove(child)
            time.sleep(0.05)
    finally:
        for child in children:  # the caller has stopped
            child.process.terminate()
            child.process.wait()
            child.folder.cleanup()


class _Child:
    """A process that compiles some jobs and writes a line a result."""

    def __init__(self, jobs: list[dict[str, Any]]):
        self.jobs = jobs
        shared = Path("/dev/shm")  # in memory where there is such a folder: a dump of a large kernel is many megabytes
        self.folder = tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None, prefix="archloom-dump-")
        self.results, self.log = (Path(self.folder.name) / name for name in ("results.jsonl", "log.txt"))
        self.read_to, self.ended = 0, False
        dump = Path(self.folder.name) / "dump"
        dump.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child", json.dumps(jobs), str(dump), str(self.results)],
            env={**os.environ, **tpu_compile.environment(dump)},
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def read(self) -> Iterator[dict[str, Any]]:
        self.ended = self.process.poll() is not None  # before the file is read: so no line is missed
        if self.results.exists():
            text = self.results.read_text()
            end = text.rfind("\n") + 1
            for line in text[self.read_to : end].splitlines():
                yield json.loads(line)
            self.read_to = end
        if self.ended and self.process.returncode:
            lines = self.log.read_text().splitlines()
            at = next((line for line in reversed(lines) if line.startswith(COMPILING)), COMPILING)
            error = f"the compiler stopped with code {self.process.returncode}: " + "\n".join(lines[-15:])
            yield {**dict(zip(("op", "generation", "pass", "case"), at[len(COMPILING) :].split(" | "))), "error": error}

    def done(self) -> bool:
        if self.ended:
            self.folder.cleanup()
        return self.ended


def child(jobs: list[dict[str, Any]], dump: Path, results: Path) -> None:
    for job in jobs:
        device = tpu_compile.device(job["generation"])
        for case in tpu_compile.cases(job["op"]):
            if job["case"] not in case.name:
                continue
            for which in job["passes"]:
                if which == "backward" and not case.backward:
                    continue
                for options in job["options"]:
                    known = {name: value for name, value in options.items() if name in case.options}
                    head = {"op": job["op"], "generation": job["generation"], "pass": which, "case": case.name}
                    print(f"{COMPILING}{key(head)}", flush=True)
                    try:
                        found = measure(case, which, device, dump, job["generation"], known)
                    except Exception as error:  # reported, and the next one is compiled
                        found = {"error": f"{type(error).__name__}: {error}"[:2000]}
                    with results.open("a") as file:
                        file.write(json.dumps({**head, "options": known, "record": case.record, **found}) + "\n")


def measure(case: Any, which: str, device: Any, dump: Path, generation: str, options: dict[str, Any]) -> dict[str, Any]:
    """One pass of a case: its kernels' schedules, the floor of bytes and the compiler's temporaries."""
    for file in dump.iterdir():
        file.unlink()
    calls = tpu_compile.kernel_calls(case, which, device, **options)
    start = time.perf_counter()
    compiled = tpu_compile.compile(case, which, device, **options)
    seconds = time.perf_counter() - start
    programs = tpu_dump.kernels(dump, calls)
    with tpu_compile.target(device):
        shares = case.shares(**options) if callable(case.shares) else case.shares
    kernels = {}
    for name, files in programs.items():
        parts = [tpu_dump.read(name, *pair, shares.get(name, ()), case.turns.get(name, ())) for pair in files]
        times = calls[name]
        first, cycles = parts[0], times * sum(part.cycles for part in parts)
        kernels[name] = {
            "bundles": cycles / case.per,
            "cycles": cycles,
            "step": first.step,
            "steps": times * sum(part.steps for part in parts),
            "whole": first.whole,
            "mxu": first.matrix,
            "valu": first.vector,
            "spills": first.spills,
            "fills": first.fills,
            "regions": list(first.regions),
        }
    counted = [n for n in kernels if which == "forward" or not RERUN.search(n)]
    bandwidth, clock = CHIPS[generation]
    memory = compiled.memory_analysis()
    least = case.bytes_forward if which == "forward" else case.bytes_backward
    return {
        "bundles": sum(kernels[n]["bundles"] for n in counted),
        "bytes_floor": least / bandwidth * clock / case.per,
        "kernels": kernels,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "seconds": seconds,
    }


def print_result(result: dict[str, Any]) -> None:
    options = "".join(f" {name}={value}" for name, value in result.get("options", {}).items())
    print(f"{key(result)}{options}", flush=True)
    if "error" in result:
        print(f"  refused: {result['error']}", flush=True)
        return
    over = result["temp_bytes"] / max(1, result["argument_bytes"])
    print(
        f"  {result['bundles']:.3f} bundles, bytes {result['bytes_floor']:.3f} cycles; temporaries "
        f"{result['temp_bytes'] / 2**20:.1f} MiB, {over:.2f} of the arguments; compiled in {result['seconds']:.1f} s"
    )
    for name, kernel in result["kernels"].items():
        print(
            f"    {name:40} {kernel['bundles']:8.3f}  body {kernel['step']} x {kernel['steps']:.0f}, whole "
            f"{kernel['whole']}; MXU {kernel['mxu']:.0%} VALU {kernel['valu']:.0%} spill {kernel['spills']:.3f} fill "
            f"{kernel['fills']:.3f}" + (f" regions {kernel['regions']}" if kernel["regions"] else ""),
            flush=True,
        )


def key(result: dict[str, Any]) -> str:
    return " | ".join(result.get(part, "") for part in ("op", "generation", "pass", "case"))


def record(found: list[dict[str, Any]]) -> None:
    """Sets the table's entries of these passes, with the versions that made them."""
    import importlib.metadata

    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for result in found:
        table[key(result)] = {
            "bundles": round(result["bundles"], 4),
            "bytes_floor": round(result["bytes_floor"], 4),
            "temp_bytes": result["temp_bytes"],
            "argument_bytes": result["argument_bytes"],
            "kernels": {
                name: {
                    "bundles": round(kernel["bundles"], 4),
                    "whole": kernel["whole"],
                    "mxu": round(kernel["mxu"], 3),
                    "spills": round(kernel["spills"], 4),
                }
                for name, kernel in result["kernels"].items()
            },
        }
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    table = {"versions": versions, **{k: table[k] for k in sorted(table) if k != "versions"}}
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


def compare(found: list[dict[str, Any]], table: dict[str, Any]) -> list[str]:
    """A line for each pass that has grown, or that the table lacks."""
    slower = []
    for result in found:
        if "error" in result:
            slower.append(f"{key(result)}: {result['error']}")
        elif key(result) not in table:
            slower.append(f"{key(result)}: not in {TABLE.name}; run scripts/tpu_schedule.py --record")
        elif result["bundles"] > (1 + GROWTH) * table[key(result)]["bundles"]:
            was, now = table[key(result)]["bundles"], result["bundles"]
            slower.append(f"{key(result)}: {was:.3f} bundles before, {now:.3f} now")
    return slower


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        sys.exit(main())
