"""Inference latency and peak memory of two configs on this device, in one run, turn by turn.

    python -m experiments.latency --config=configs/wide/imdb_bytes.py:softmax-6x8
        --against=configs/wide/imdb_bytes.py:softmax-1x48 [--batch=1,32] [--lengths=1000,4000] [--read=all,pooled]
        [--rounds=7] [--record=results/latency.jsonl]

Each side of each case is a process of its own, with its forward pass compiled for one batch and length. The two take
turns, each repeating the pass for about --seconds; a time is the median of a turn, a figure the median over rounds
(lowest to highest), a ratio --config by --against, round by round; on a busy machine the processor time of all cores is
the steadier figure. Inputs are random and without padding, parameters fresh: no data set is read. --lengths replaces
the length of the task's inputs; --config.* overrides hold for both.

--read=all,pooled measures every case twice: as it is, and with model.read=pooled, where the last layer computes the one
token that the classifier reads and nothing else. The logits are the same but for rounding.

Memory: "compiled" is what the compiler says of the program, "resident" the most that the process held while it ran
(on an accelerator: the most in use on the device).

Parts: the same parameters run apart, each part over all layers in a row. "projections" are the matrices of the token
mixers, "mixing" what else these do (scores, softmax, weighted sums), "rest" what the parts leave of the whole:
embedding, norms, residuals and head. It carries the errors of all, and can come out below zero. Not with
model.read=pooled.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arch.errors import ConfigError
from experiments import cli, turns
from experiments import config as configs
from experiments.files import read_lines

READS = {"all": "all tokens", "pooled": "the CLS token alone"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One program."""

    source: str
    overrides: dict[str, str]
    batch: int
    length: int | None  # None: the task's own
    parts: bool


def serve(case: Case) -> tuple[dict[str, str], Callable[..., Any]]:
    """The child's side: versions, and a function (request, seconds) for the requests facts, turn, parts and peak."""
    from experiments import environment

    environment.keep_memory()  # as the trainer does, before jax starts its threads
    import jax

    from experiments.forward import Forward

    program = Forward(configs.configure(case.source, case.overrides), case.batch, case.length)
    apart = program.parts() if case.parts else {}
    program()
    for part in apart.values():
        part()
    facts = program.facts()
    environment.reset_peak()

    def answer(request: str, seconds: float = 0.0) -> Any:
        if request == "turn":
            return repeated(program, seconds)
        if request == "parts":
            return {name: repeated(part, seconds)[0] for name, part in apart.items()}
        return facts if request == "facts" else environment.peak_bytes()

    return {"jax": jax.__version__, "jaxlib": jax.lib.__version__, "device": environment.device()}, answer


def repeated(call: Callable[[], Any], seconds: float) -> tuple[float, int]:
    """The median time of calls that go on for so long, one at least, and how many they were."""
    times: list[float] = []
    while not times or sum(times) < seconds:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times), len(times)


def start(name: str, case: Case, threads: int) -> turns.Side:
    command = [sys.executable, "-m", "experiments.latency", f"--threads={threads}"]
    words = json.dumps(dataclasses.asdict(case))
    return turns.Side(name, [*command, f"--child={words}"], threads, XLA_PYTHON_CLIENT_PREALLOCATE="false")


def measure(cases: dict[str, Case], *, rounds: int, seconds: float, threads: int) -> dict[str, Any]:
    """{side: its figures}, {"ratio": ...} of the first side by the second, and the sides' versions."""
    sides = {name: start(name, case, threads) for name, case in cases.items()}
    whole: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    apart: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            answer = side.run("turn", seconds)
            middle, calls = answer["result"]
            whole[name].append(middle)
            processor[name].append(answer["processor"] / calls)
        for name, side in sides.items():
            apart[name].append(side.run("parts", seconds / 4)["result"])
    found: dict[str, Any] = {}
    for name, side in sides.items():
        facts = side.run("facts")["result"]
        found[name] = {"source": cases[name].source, "milliseconds": spread(whole[name], 1e3), **facts}
        found[name]["processor_milliseconds"] = spread(processor[name], 1e3)
        found[name]["peak_bytes"] = side.run("peak")["result"]
        if apart[name][0]:
            found[name]["parts"] = shares(statistics.median(whole[name]), apart[name])
    a, b = (found[name] for name in sides)
    found["ratio"] = {
        "latency": spread([x / y for x, y in zip(*whole.values())]),
        "processor": spread([x / y for x, y in zip(*processor.values())]),
        **{what: round(a[what] / b[what], 3) for what in ("flops", "params", "peak_bytes")},
    }
    if a["compiled_bytes"] and b["compiled_bytes"]:
        found["ratio"]["compiled_bytes"] = round(a["compiled_bytes"]["total"] / b["compiled_bytes"]["total"], 3)
    for side in sides.values():
        side.close()
    return {**found, "versions": {name: side.versions for name, side in sides.items()}}


def spread(values: list[float], scale: float = 1.0) -> list[float]:
    """Median, lowest and highest, to four digits."""
    return [float(f"{scale * x:.4g}") for x in (statistics.median(values), min(values), max(values))]


def shares(whole: float, rounds: list[dict[str, float]]) -> dict[str, float]:
    """Milliseconds of each part, medians over rounds."""
    times = {name: statistics.median(turn[name] for turn in rounds) for name in rounds[0]}
    parts = {"projections": times["projections"], "mixing": times["mixer"] - times["projections"]}
    parts["channel"] = times["channel"]
    parts["rest"] = whole - times["mixer"] - times["channel"]
    return {name: round(1e3 * value, 3) for name, value in parts.items()}


def text(record: dict[str, Any]) -> str:
    """One case as a table."""
    from experiments.plan import binary, si

    names = [name for name in record if isinstance(record[name], dict) and "milliseconds" in record[name]]
    sides, ratio = [record[name] for name in names], record["ratio"]
    length = "the task's length" if record["length"] is None else f"length {record['length']}"
    read = "" if record["read"] is None else f", the last layer computes {READS[record['read']]}"
    lines = [f"batch {record['batch']}, {length}{read}", f"  {'':22}{names[0]:>26}{names[1]:>26}{'ratio':>24}"]

    def row(what: str, values: list[str], last: str = "") -> None:
        lines.append(f"  {what:22}{values[0]:>26}{values[1]:>26}{last:>24}".rstrip())

    def ranged(values: list[float], digits: int) -> str:
        middle, low, high = (f"{x:.{digits}f}" for x in values)
        return f"{middle} ({low} to {high})"

    row("latency, ms", [ranged(side["milliseconds"], 2) for side in sides], ranged(ratio["latency"], 2))
    row("processor time, ms", [ranged(s["processor_milliseconds"], 2) for s in sides], ranged(ratio["processor"], 2))
    row("forward FLOPs", [si(side["flops"]) for side in sides], f"{ratio['flops']:.2f}")
    row("parameters", [si(side["params"]) for side in sides], f"{ratio['params']:.2f}")
    if "compiled_bytes" in ratio:
        row("memory, compiled", [binary(s["compiled_bytes"]["total"]) for s in sides], f"{ratio['compiled_bytes']:.2f}")
        row("  of it temporaries", [binary(s["compiled_bytes"]["temp"]) for s in sides])
    row("memory, resident", [binary(side["peak_bytes"]) for side in sides], f"{ratio['peak_bytes']:.2f}")
    for part in sides[0].get("parts", {}) if all("parts" in side for side in sides) else ():
        times = [side["parts"][part] for side in sides]
        row(f"  ms of {part}", [f"{t:.2f}" for t in times], f"{times[0] / times[1]:.2f}" if min(times) > 0 else "")
    return "\n".join(lines)


def show(file: Path) -> None:
    """The tables of a file of records."""
    for record in read_lines(file):
        first = next(iter(record["versions"].values()))
        print(f"{record['time']}, {first['device']}, jax {first['jax']}, commit {(record['commit'] or '?')[:7]}")
        print(text(record) + "\n")


def numbers(words: str, flag: str) -> list[int]:
    """1,32 as [1, 32]."""
    found = [int(word) if word.isdigit() else 0 for word in words.split(",")]
    if min(found) < 1:
        raise ConfigError(flag, f"{words!r} is not a list of whole numbers above 0, such as 1,32")
    return found


@cli.command
def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="experiments.latency", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--against", help="the other config, FILE.py[:ARG]")
    parser.add_argument("--batch", default="1,32", help="batch sizes")
    parser.add_argument("--lengths", help="input lengths; the task's own by default")
    parser.add_argument("--read", help="of model.read: all, pooled or both; as the configs say by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="a turn lasts so long, and one pass at least")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="processor cores of a side")
    parser.add_argument("--no-parts", action="store_true", help="without the breakdown")
    parser.add_argument("--record", type=Path, help="a file of JSON lines; one a case is added")
    parser.add_argument("--show", type=Path, help="print the tables of a file of records, and nothing else")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    source, overrides, flags = configs.split(argv, parser, required=False)
    if flags.child:
        turns.serve(flags.threads, lambda: serve(Case(**json.loads(flags.child))))
        return 0
    if flags.show:
        show(flags.show)
        return 0
    for flag, value in (("--config", source), ("--against", flags.against)):
        if not value:
            raise ConfigError(flag, "missing; name a config file, such as configs/wide/imdb_bytes.py:softmax-1x48")
    if flags.rounds < 1:
        raise ConfigError("--rounds", f"{flags.rounds} is not above 0")
    batches = numbers(flags.batch, "--batch")
    lengths: list[int | None] = [*numbers(flags.lengths, "--lengths")] if flags.lengths else [None]
    sources = dict(zip(labels(source, flags.against), (source, flags.against)))
    reads: list[str | None] = [*flags.read.split(",")] if flags.read else [None]
    changed = {read: {**overrides, **({} if read is None else {"model.read": read})} for read in reads}
    for each in sources.values():
        for change in changed.values():
            configs.configure(each, change)  # a mistake is told before anything starts
    for length, batch in itertools.product(lengths, batches):
        for read, change in changed.items():
            cases = {name: Case(each, change, batch, length, not flags.no_parts) for name, each in sources.items()}
            found = measure(cases, rounds=flags.rounds, seconds=flags.seconds, threads=flags.threads)
            about = {"bench": "latency", "batch": batch, "length": length, "read": read, "overrides": overrides}
            record = {**about, "rounds": flags.rounds, "threads": flags.threads, **found, **turns.origin()}
            print(text(record), flush=True)
            if flags.record:
                flags.record.parent.mkdir(parents=True, exist_ok=True)
                with flags.record.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    return 0


def labels(one: str, two: str) -> list[str]:
    """Short names of the two sides: the arguments of their configs, else their files, else "config" and "against"."""
    for short in ([s.partition(":")[2] for s in (one, two)], [Path(s.partition(":")[0]).stem for s in (one, two)]):
        if all(short) and short[0] != short[1]:
            return short
    return ["config", "against"]


if __name__ == "__main__":
    sys.exit(main())
