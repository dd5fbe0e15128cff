"""From run folders to the cells of a table: runs of one config hash, their mean, interval and cost."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from arch.errors import Mistake
from experiments.formats import number, percent
from experiments.reporting.statistics import student_t, wilson
from experiments.runs import Run, flatten, read_runs

# LRA's own settings [google-research/long-range-arena @ cd31e5c]; None: LRA's value is the default.
LRA: dict[str, dict[str, tuple[Any, ...]]] = {
    "listops": {
        "max_length": (2000,),
        "min_length": (None, 500),
        "max_depth": (10,),
        "max_args": (10,),
        "train_examples": (96_000,),
        "validation_examples": (2_000,),
        "test_examples": (2_000,),
    },
    "imdb": {"level": ("bytes",), "max_length": (1000,), "protocol": ("release",), "published": (True,)},
    "matching": {"max_length": (4000,), "published": (True,)},
}
WHERE = ("name", "data_dir")  # options of a task that say nothing about its examples
SAME = ("train.steps", "train.batch_size", "train.precision")  # a comparison holds these equal, or says so


class TableError(Mistake):
    """No table can be made; one line with the remedy."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """Every run of one config. `done` holds one run a seed; accuracy and interval are of the test split."""

    hash: str
    label: str
    runs: tuple[Run, ...]
    done: tuple[Run, ...]

    @property
    def config(self) -> dict[str, Any]:
        return self.runs[0].config

    @property
    def anchor(self) -> str:
        return f"cell-{self.hash}"

    def seeds(self, *status: str) -> list[int]:
        """The seeds none of whose runs got further than status."""
        finished = {run.seed for run in self.done}
        return sorted({run.seed for run in self.runs if run.status in status} - finished)

    @property
    def accuracies(self) -> list[float]:
        return [run.summary["final"]["test"]["accuracy"] for run in self.done if run.summary]

    @property
    def mean(self) -> float | None:
        return mean(self.accuracies)

    @property
    def interval(self) -> tuple[float, float] | None:
        if not self.done:
            return None
        if len(self.done) > 1:
            return student_t(self.accuracies)
        return wilson(self.accuracies[0], self.examples)

    @property
    def method(self) -> str:
        """What the interval covers."""
        if not self.done:
            return ""
        return f"t, {len(self.done)} seeds" if len(self.done) > 1 else f"Wilson, {self.examples} examples"

    @property
    def examples(self) -> int:
        return self._first("final")["test"]["examples"]

    @property
    def majority(self) -> float | None:
        return self._first("task")["majority"] if self.done else None

    @property
    def chance(self) -> float | None:
        return self._first("task")["chance"] if self.done else None

    @property
    def verdict(self) -> str:
        """Where the interval lies against the majority-class level: above, below, or it holds the level."""
        if self.interval is None or self.majority is None:
            return ""
        low, high = self.interval
        return "above" if low > self.majority else "below" if high < self.majority else "not distinct"

    @property
    def params(self) -> int | None:
        return self._first("params") if self.done else None

    @property
    def flops(self) -> float | None:
        return self._first("flops") if self.done else None

    @property
    def train_flops(self) -> float | None:
        return self._first("train_flops") if self.done else None

    @property
    def steps_per_second(self) -> float | None:
        return mean([run.summary["steps_per_second"] for run in self.done if run.summary])

    @property
    def train_seconds(self) -> float | None:
        return mean([run.summary["seconds"]["train"] for run in self.done if run.summary])

    @property
    def device(self) -> str:
        return "; ".join(distinct(run.environment.get("device") or "unknown" for run in self.runs))

    @property
    def commit(self) -> str:
        return "; ".join(distinct(commit(run) for run in self.runs))

    def curve(self, split: str = "validation") -> list[tuple[int, float, float, float, float]]:
        """(step, seconds, mean, least, most accuracy) over the finished seeds, at the steps that all of them have."""
        curves = [{r["step"]: r for r in run.curve(split)} for run in self.done]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        points = []
        for step in steps:
            values = [curve[step]["accuracy"] for curve in curves]
            seconds = math.fsum(curve[step]["seconds"] for curve in curves) / len(curves)
            points.append((step, seconds, math.fsum(values) / len(values), min(values), max(values)))
        return points

    def _first(self, field: str) -> Any:
        assert self.done[0].summary is not None
        return self.done[0].summary[field]


@dataclasses.dataclass(frozen=True)
class Table:
    """The cells of a task, best first, with what they share and what the reader has to be warned of."""

    task: str
    cells: tuple[Cell, ...]
    settings: dict[str, Any]  # options of task and training that every cell shares
    departures: list[str]  # where the data is not LRA's
    warnings: list[str]


def read_table(root: Path, task: str) -> Table:
    """The table of a task from every run below root whose objective has an accuracy."""
    every = read_runs(root)
    of_task = [run for run in every if run.task == task]
    found = [run for run in of_task if run.objective == "classify"]
    others = [run for run in of_task if run.objective != "classify"]
    left_out = f"runs without an accuracy, of the objectives {', '.join(distinct(run.objective for run in others))}"
    if others and not found:
        raise TableError(f"{root} holds of task {task!r} only {left_out}; see loss and test loss in their summary.json")
    if not found:
        tasks = distinct(run.task for run in every)
        there = f"the runs there are of {', '.join(tasks)}" if tasks else "there are no runs at all"
        raise TableError(f"no runs of task {task!r} below {root}; {there}")
    groups: dict[str, list[Run]] = {}
    for run in found:
        groups.setdefault(run.hash, []).append(run)
    labels = label(groups)
    warnings = [f"left out: {len(others)} {left_out}"] if others else []
    cells = []
    for key, members in groups.items():
        members.sort(key=lambda run: (run.seed, str(run.path)))
        cells.append(Cell(key, labels[key], tuple(members), tuple(_one_a_seed(labels[key], members, root, warnings))))
    cells.sort(key=lambda cell: (-(cell.mean if cell.mean is not None else -1.0), cell.label, cell.hash))
    flat = [flatten(cell.config) for cell in cells]
    first = [f"task.{key}" for key in LRA.get(task, {})]  # in this order, then the rest
    keys = [*first, *(key for key in flat[0] if key.startswith("task.") and key not in first), *SAME]
    settings = {key: flat[0].get(key) for key in keys if all(other.get(key) == flat[0].get(key) for other in flat)}
    settings = {key: value for key, value in settings.items() if key.removeprefix("task.") not in WHERE}
    notes = distinct(run.summary["task"].get("note") for run in found if run.summary and run.summary.get("task"))
    warnings = [*(text for text in notes if text), *warnings, *_mixtures(cells, flat)]
    return Table(task, tuple(cells), settings, _departures(task, flat), warnings)


def label(groups: dict[str, list[Run]]) -> dict[str, str]:
    """A name for every hash: the config's arg; where several share it, with the options in which they differ."""
    names = {key: runs[0].label for key, runs in groups.items()}
    for name in distinct(names.values()):
        same = sorted(key for key, other in names.items() if other == name)
        if len(same) == 1:
            continue
        flat = {key: flatten(groups[key][0].config) for key in same}
        every = sorted(set().union(*flat.values()) - {"seed"})
        differ = [path for path in every if len({repr(flat[key].get(path)) for key in same}) > 1]
        for key in same:
            words = [f"{path.rpartition('.')[2]}={flat[key].get(path)}" for path in differ]
            names[key] = f"{name}, {', '.join(words)}" if 0 < len(words) <= 3 else f"{name}, {key}"
    if len(set(names.values())) < len(names):
        names = {key: f"{name}, {key}" for key, name in names.items()}
    return names


def _one_a_seed(name: str, runs: Sequence[Run], root: Path, warnings: list[str]) -> list[Run]:
    """The finished runs, one a seed: a repeated seed is no second sample."""
    kept: dict[int, Run] = {}
    for run in runs:
        if run.status != "done":
            continue
        first = kept.setdefault(run.seed, run)
        if first is not run:
            same = (first.summary or {}).get("param_hash") == (run.summary or {}).get("param_hash")
            outcome = "with the same parameters" if same else "with other parameters"
            paths = f"{first.path.relative_to(root)} counts, {run.path.relative_to(root)} does not"
            warnings.append(f"{name}: seed {run.seed} was run twice, {outcome}: {paths}")
    return list(kept.values())


def _departures(task: str, flat: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    for key, standard in LRA.get(task, {}).items():
        values = distinct(config.get(f"task.{key}") for config in flat)
        if any(value not in standard for value in values):
            found.append(f"{key} {' and '.join(number(v) for v in values)} (LRA: {number(standard[-1])})")
    return found


def _mixtures(cells: Sequence[Cell], flat: Sequence[dict[str, Any]]) -> list[str]:
    runs = [run for cell in cells for run in cell.runs]
    found = []
    hashes = distinct(run.summary["task"]["content_hash"] for run in runs if run.summary and run.summary.get("task"))
    if len(hashes) > 1:
        short = ", ".join(value[:12] for value in hashes)
        found.append(f"mixed data: the rows were measured on different examples ({short}); do not compare them")
    differ = [k for k in flat[0] if k in SAME or (k.startswith("task.") and k[5:] not in WHERE)]
    for key in differ:
        values = distinct(config.get(key) for config in flat)
        if len(values) > 1:
            found.append(f"mixed settings: {key} is {', '.join(number(value) for value in values)}")
    for what, values, why in (
        ("devices", distinct(r.environment.get("device") or "unknown" for r in runs), "speeds do not compare"),
        ("commits", distinct(commit(run) for run in runs), "the code differs between runs"),
    ):
        if len(values) > 1:
            found.append(f"mixed {what}: {', '.join(values)}; {why}")
    if any(run.environment.get("dirty") for run in runs):
        found.append("uncommitted changes: the commits marked + do not describe the code of their runs")
    majorities = distinct(cell.majority for cell in cells if cell.majority is not None)
    if len(majorities) > 1:
        found.append(f"mixed majority-class levels: {', '.join(percent(value) for value in majorities)}")
    return found


def commit(run: Run) -> str:
    """The commit of the source, + where it had uncommitted changes."""
    text = (run.environment.get("commit") or "unknown")[:12]
    return text + ("+" if run.environment.get("dirty") else "")


def mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def distinct(values: Iterable[Any]) -> list[Any]:
    plain = {tuple(value) if isinstance(value, list) else value for value in values}
    return sorted(plain, key=lambda value: (value is None, value))
