"""What is in a task: prepares it, then prints its hash, sizes, lengths and class shares.

Run: python -m experiments.data listops [--max_length=128 ...] [--json] [--export_tsv=DIR]
The options are the task's own. --export_tsv writes LRA's basic_*.tsv.
"""

import ast
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from arch import schema
from arch.errors import ConfigError, within
from arch.registry import TASKS
from experiments.data import listops_tsv
from experiments.data.listops import ListOps
from experiments.data.store import DataError
from experiments.data.task import TokenExamples


def describe(examples: TokenExamples, num_classes: int) -> dict[str, Any]:
    """Size, length statistics and class shares of a split."""
    lengths = examples.lengths
    p10, median, p90 = np.percentile(lengths, (10, 50, 90)).tolist()
    shares = np.bincount(examples.labels, minlength=num_classes) / len(examples)
    return {
        "examples": len(examples),
        "length": {
            "mean": float(lengths.mean()), "p10": p10, "median": median, "p90": p90,
            "min": int(lengths.min()), "max": int(lengths.max()),
        },
        "majority": examples.majority(),
        "class_shares": shares.tolist(),
    }  # fmt: skip


def report(task: ListOps) -> dict[str, Any]:
    """Prepares the task; `all` is the splits together."""
    start = time.perf_counter()
    task.prepare()
    seconds = time.perf_counter() - start
    splits = {name: task.examples(name) for name in task.splits}
    together = TokenExamples.pack(examples[i] for examples in splits.values() for i in range(len(examples)))
    return {
        "task": "listops",
        "variant": task.variant if task.tsv_dir is None else task.tsv_dir,
        "content_hash": task.content_hash,
        "seconds": seconds,
        "chance": task.chance,
        "splits": {name: describe(x, task.spec.num_classes) for name, x in (splits | {"all": together}).items()},
    }


def table(facts: dict[str, Any]) -> str:
    lines = [f"{key:13} {facts[key]}" for key in ("task", "variant", "content_hash", "chance")]
    lines += [f"{'prepared in':13} {facts['seconds']:.1f} s", ""]
    columns = ("examples", "mean", "p10", "median", "p90", "min", "max", "majority")
    lines.append(f"{'split':11}" + "".join(f"{column:>9}" for column in columns))
    for name, split in facts["splits"].items():
        cells = [f"{split['examples']:,}", *(f"{split['length'][column]:.0f}" for column in columns[1:-1])]
        lines.append(f"{name:11}" + "".join(f"{cell:>9}" for cell in [*cells, f"{split['majority']:.1%}"]))
    lines += [
        "",
        f"{'class':11}" + "".join(f"{label:>7}" for label in range(len(facts["splits"]["all"]["class_shares"]))),
    ]
    for name, split in facts["splits"].items():
        lines.append(f"{name:11}" + "".join(f"{share:7.1%}" for share in split["class_shares"]))
    return "\n".join(lines)


def parse(arguments: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The task's options and this program's own flags, from --option=value ..."""
    options: dict[str, Any] = {}
    own: dict[str, str] = {}
    for argument in arguments:
        key, _, value = argument.removeprefix("--").partition("=")
        if key in ("json", "export_tsv"):
            own[key] = value
        else:
            try:
                options[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                options[key] = value  # a bare word is a string
    return options, own


def main(arguments: list[str]) -> int:
    try:
        name = arguments[0] if arguments else ""
        options, own = parse(arguments[1:])
        with within("task"):
            known = TASKS.options(name)
        task = TASKS.build({"name": name, **schema.resolve(options, known, "task")}, path="task")
        facts = report(task)
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(facts) if "json" in own else table(facts))
    if "export_tsv" in own:
        listops_tsv.write(Path(own["export_tsv"]), {name: task.examples(name) for name in task.splits})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
