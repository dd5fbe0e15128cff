"""Reads run folders: what the trainer wrote, as plain data. Imports nothing heavy, writes nothing.

A run is a folder with config.json. One without summary.json is unfinished, and its last JSON line may be torn.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from arch.errors import Mistake

Record = dict[str, Any]


class RunError(Mistake):
    """A run folder that cannot be read; one line that names the file and the remedy."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run folder."""

    path: Path
    config: dict[str, Any]
    hash: str
    seed: int
    source: str  # "configs/quickstart.py:linear"
    environment: Record
    metrics: list[Record]
    ledger: list[Record]
    summary: Record | None

    @property
    def status(self) -> str:
        """done, failed or unfinished."""
        return self.summary["status"] if self.summary else "unfinished"

    @property
    def reason(self) -> str:
        return (self.summary or {}).get("reason") or ""

    @property
    def task(self) -> str:
        return self.config["task"]["name"]

    @property
    def objective(self) -> str:
        """What it was trained for."""
        return self.config.get("objective", {"name": "classify"})["name"]

    @property
    def label(self) -> str:
        """What the config file was asked for: the arg, or the file's name when it had none."""
        file, _, arg = self.source.partition(":")
        return arg or Path(file).stem

    def curve(self, split: str) -> list[Record]:
        """The records of a split by step; a step done again after a resume counts once, the later time."""
        return [record for _, record in sorted({r["step"]: r for r in self.metrics if r["split"] == split}.items())]

    def seconds(self) -> dict[str, float]:
        """Where the seconds went: the ledger's events, summed by kind in order of first appearance."""
        total: dict[str, float] = {}
        for record in self.ledger:
            if record.get("seconds"):
                total[record["event"]] = total.get(record["event"], 0.0) + record["seconds"]
        return total


def read_run(folder: Path) -> Run:
    """The run in folder."""
    saved = _json(folder / "config.json")
    if saved is None:
        raise RunError(f"{folder}: no config.json; not a run folder")
    try:
        return Run(
            path=folder,
            config=saved["config"],
            hash=saved["hash"],
            seed=saved["seed"],
            source=saved["source"],
            environment=_json(folder / "environment.json") or {},
            metrics=_lines(folder / "metrics.jsonl"),
            ledger=_lines(folder / "ledger.jsonl"),
            summary=_json(folder / "summary.json"),
        )
    except KeyError as error:
        raise RunError(f"{folder / 'config.json'}: no field {error}; not written by experiments.train") from None


def read_runs(root: Path) -> list[Run]:
    """Every run at or below root, by path."""
    if not root.is_dir():
        raise RunError(f"{root}: no such folder")
    found = []
    for folder, below, files in os.walk(root):
        below.sort()
        if "config.json" in files:
            below.clear()  # a run holds no runs; its checkpoints can be many files
            found.append(Path(folder))
    return [read_run(folder) for folder in sorted(found)]


def read_summary(folder: Path) -> Record | None:
    """summary.json, or None while the run is unfinished."""
    return _json(folder / "summary.json")


def latest(folder: Path, window: int = 1 << 15) -> dict[str, Record]:
    """The last record of each split, from the end of metrics.jsonl; cheap enough to poll while the run goes on."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - window))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return {}
    found: dict[str, Record] = {}
    for line in lines:
        try:
            record = json.loads(line)
            found[record["split"]] = record
        except (ValueError, KeyError, TypeError):
            continue  # cut at the front by the window or at the end by the writer
    return found


def last_line(file: Path, window: int = 1 << 13) -> str:
    """The last line of a log that is not blank; progress bars redraw with carriage returns."""
    try:
        with open(file, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - window))
            lines = log.read().decode(errors="replace").replace("\r", "\n").split("\n")
    except FileNotFoundError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; an empty subtree stays as it is."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _json(file: Path) -> Record | None:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunError(f"{file}: damaged ({error}); delete the run folder and run it again") from None


def _lines(file: Path) -> list[Record]:
    try:
        lines = file.read_text().split("\n")
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):  # a torn last line has no newline after it
                raise RunError(f"{file}:{number}: damaged ({error})") from None
    return records
