"""Trains every mixer in every role of every topology for 20 steps, or says why it has no place there.

    python -m experiments.matrix [--mixers=mamba,pooling] [--roles=metaformer,pyramid] [--minutes=5] [--resume]
    python -m experiments.matrix --table          # only what the records say

A cell is a mixer in a role: all layers of a MetaFormer, one wide layer, the full or the near layer of a MASFormer, the
local or the global layers of a FIT, a stage of a pyramid. It is built at width 16, trained on a task of 16 tokens or 64
pixels, and its loss on one batch compared before and after; or it is refused, before anything compiles, with a reason.
A mixer that lacks the role's mode has a second cell with the remedy: wrapped in `bidirectional`, or causal=False.
That a cell's loss falls says that it is wired right, and nothing of what it can learn (experiments.learn does that).
Each cell is one line of the records. --resume passes over those on record with the same config and commit. Compiled
with few optimisations, so its seconds are no speeds. Exit code 0: every cell has its record and none failed.
"""

import os
import signal
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli, environment
from experiments.matrices import pool, records
from experiments.matrices.cells import cells
from experiments.matrices.run import identity

RECORDS = Path(__file__).resolve().parent.parent / "results" / "matrix.jsonl"


def main(argv: Sequence[str]) -> int:
    begin = time.monotonic()
    flags = parse(argv)
    wanted = cells(flags.mixers, flags.roles)
    about = environment.describe()
    about = {key: about[key] for key in ("device", "commit", "dirty", "command", "python", "packages")}
    known = records.read(flags.record)
    todo = [] if flags.table else wanted
    if flags.resume:
        todo = [cell for cell in todo if not records.held(known, cell, identity(cell), about["commit"])]
    until = None if flags.minutes is None else begin + 60 * flags.minutes
    if not flags.table:
        print(f"{len(todo)} cells to run, {len(wanted) - len(todo)} on record; {flags.workers} at a time", flush=True)
    for number, (cell, outcome) in enumerate(pool.outcomes(todo, flags.workers, until), 1):
        ended = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        records.add(flags.record, cell, outcome, {"ended_at": ended, **about})
        print(f"[{number}/{len(todo)}] {cell.name}: {said(outcome)}", flush=True)
    found = records.newest(records.read(flags.record), wanted)
    print("\n" + records.summary(found, wanted))
    print(f"{time.monotonic() - begin:.0f} s")
    return 0 if len(found) == len(wanted) and records.sound(found) else 1


def parse(argv: Sequence[str]) -> Any:
    parser = cli.Parser(
        prog="python -m experiments.matrix", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--mixers", default="", help="some of the mixers, a comma between (default: all)")
    parser.add_argument("--roles", default="", help="some of the roles, a comma between (default: all)")
    parser.add_argument("--minutes", type=float, help="begin no cell after so many minutes")
    parser.add_argument("--workers", type=int, default=cores, help="processes, each on a core (default: all cores)")
    parser.add_argument("--resume", action="store_true", help="pass over cells on record with this config and commit")
    parser.add_argument("--table", action="store_true", help="run nothing, say what is on record")
    parser.add_argument("--record", type=Path, default=RECORDS, help="file to which records are added")
    flags = parser.parse_args(argv)
    flags.mixers, flags.roles = ([name for name in text.split(",") if name] for text in (flags.mixers, flags.roles))
    return flags


def said(outcome: dict[str, Any]) -> str:
    if "reason" in outcome:
        return f"{outcome['status']}: {outcome['reason']}"
    change = f"loss {outcome['loss_before']:.3f} to {outcome['loss_after']:.3f}"
    still = f", {len(outcome['unmoved'])} parameters never moved" if outcome["unmoved"] else ""
    return f"{change}, {outcome['params']:,} parameters, {outcome['seconds']:.1f} s{still}"


if __name__ == "__main__":
    environment.quiet()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(cli.command(main)())
