"""What is in a task: prepares it, then prints its hash, sizes, lengths and class shares.

Run: python -m experiments.data listops [--max_length=128 ...] [--json] [--export_tsv=DIR]
     python -m experiments.data imdb --data_dir=FOLDER
The options are the task's own. --export_tsv writes LRA's basic_*.tsv.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from arch import schema
from arch.errors import ConfigError, unknown, within
from arch.registry import TASKS
from experiments import cli, environment
from experiments import config as configs
from experiments.data import listops_tsv

MOST_CLASSES = 20  # shares are printed of no more, and are in the JSON object of all


def describe(count: int, lengths: np.ndarray | None, targets: np.ndarray, num_classes: int) -> dict[str, Any]:
    """Size, length statistics and class shares of a split, whose targets are those of all that is scored."""
    shares = np.bincount(targets, minlength=num_classes) / targets.size
    found: dict[str, Any] = {"examples": count, "scored": targets.size}
    if lengths is not None:
        p10, median, p90 = np.percentile(lengths, (10, 50, 90)).tolist()
        found["length"] = {
            "mean": float(lengths.mean()), "p10": p10, "median": median, "p90": p90,
            "min": int(lengths.min()), "max": int(lengths.max()),
        }  # fmt: skip
    return {**found, "majority": float(shares.max()), "class_shares": shares.tolist()}


def columns(task: Any, split: str) -> tuple[int, np.ndarray | None, np.ndarray]:
    """Of a split: how many examples, the length of each text of each (None: images), and every target."""
    if task.token_labels:
        source = task.source(split)
        return len(source), np.full(len(source), task.spec.length), source.targets
    if not hasattr(task, "examples"):
        raise ConfigError("task", "is not held in memory, so there is nothing to count; train on it to read it")
    examples = task.examples(split)
    lengths = getattr(examples, "lengths", None)
    return len(examples), None if lengths is None else lengths.ravel(), examples.labels


def report(name: str, task: Any) -> dict[str, Any]:
    """Prepares the task; `all` is the splits together."""
    start = time.perf_counter()
    task.prepare()
    seconds = time.perf_counter() - start
    splits = {split: columns(task, split) for split in task.splits}
    counts, lengths, targets = zip(*splits.values())
    every = None if lengths[0] is None else np.concatenate(lengths)
    splits["all"] = sum(counts), every, np.concatenate(targets)
    return {
        "task": name,
        **about(task),
        "content_hash": task.content_hash,
        "seconds": seconds,
        "chance": task.chance,
        "splits": {split: describe(*found, task.spec.num_classes) for split, found in splits.items()},
    }


def about(task: Any) -> dict[str, str]:
    """Which data it is: the variant that was made, or the folder that was read; and what has to be said of it."""
    read = getattr(task, "tsv_dir", None) or getattr(task, "variant", None) or getattr(task, "folder", None)
    found = {"variant": read and str(read), "note": getattr(task, "note", None)}
    return {key: value for key, value in found.items() if value}


def table(facts: dict[str, Any]) -> str:
    lines = [f"{key:13} {facts[key]}" for key in ("task", "variant", "note", "content_hash", "chance") if key in facts]
    lines += [f"{'prepared in':13} {facts['seconds']:.1f} s", ""]
    sizes = facts["splits"]["all"].get("length", {})
    lines.append(f"{'split':11}" + "".join(f"{name:>9}" for name in ("examples", "scored", *sizes, "majority")))
    for name, split in facts["splits"].items():
        cells = [f"{split['examples']:,}", f"{split['scored']:,}"]
        cells += [f"{split['length'][size]:.0f}" for size in sizes]
        lines.append(f"{name:11}" + "".join(f"{cell:>9}" for cell in [*cells, f"{split['majority']:.1%}"]))
    classes = range(len(facts["splits"]["all"]["class_shares"]))
    if len(classes) > MOST_CLASSES:
        return "\n".join(lines)
    lines += ["", f"{'class':11}" + "".join(f"{label:>7}" for label in classes)]
    for name, split in facts["splits"].items():
        lines.append(f"{name:11}" + "".join(f"{share:7.1%}" for share in split["class_shares"]))
    return "\n".join(lines)


@cli.command
def main(argv: list[str]) -> None:
    parser = cli.Parser(prog="python -m experiments.data", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("task", help=f"one of {', '.join(TASKS.names())}; its options follow as --option=value")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with the machine it was made on")
    parser.add_argument("--export_tsv", type=Path, metavar="DIR", help="write LRA's basic_*.tsv there")
    flags, rest = parser.parse_known_args(argv)
    task = TASKS.build({"name": flags.task, **options(flags.task, rest)}, path="task")
    if flags.export_tsv is not None and flags.task != "listops":
        raise ConfigError("--export_tsv", f"writes ListOps as LRA keeps it, and {flags.task} has no such form")
    facts = report(flags.task, task)
    print(json.dumps({**facts, **environment.describe()}) if flags.json else table(facts))
    if flags.export_tsv is not None:
        listops_tsv.write(flags.export_tsv, {name: task.examples(name) for name in task.splits})


def options(task: str, words: list[str]) -> dict[str, Any]:
    """The task's own options from --option=value ..., checked."""
    with within("task"):
        known = TASKS.options(task)
    found = {}
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            raise ConfigError(f"task.{key}", "has no value; write --option=value")
        if key not in known:
            raise unknown(f"task.{key}", key, known, "key")
        found[key] = configs.parse(value, known[key].annotation, f"task.{key}")
    return schema.resolve(found, known, "task")


if __name__ == "__main__":
    sys.exit(main())
