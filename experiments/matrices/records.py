"""The matrix's records, one JSON line a cell, and what they say together."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.matrices.cells import Cell

Record = Mapping[str, Any]


def read(file: Path) -> list[Record]:
    """All records of a file, in order; none if there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines() if line] if file.exists() else []


def add(file: Path, cell: Cell, outcome: Record, about: Record) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    row = {"mixer": cell.mixer, "role": cell.role, "form": cell.form, **outcome, **about}
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")


def cell_of(record: Record) -> Cell:
    return Cell(record["mixer"], record["role"], record["form"])


def held(records: Iterable[Record], cell: Cell, config_hash: str | None, commit: str | None) -> bool:
    """Is there an outcome of this cell with the same config, from this commit?"""
    return any(
        cell_of(record) == cell and record.get("config_hash") == config_hash and record.get("commit") == commit
        for record in records
    )


def newest(records: Iterable[Record], wanted: Sequence[Cell]) -> dict[Cell, Record]:
    """The last outcome of each wanted cell that has one."""
    last = {cell_of(record): record for record in records}
    return {cell: last[cell] for cell in wanted if cell in last}


def sound(found: Mapping[Cell, Record]) -> bool:
    """Every cell lowered its loss or was refused."""
    return all(record["status"] in ("lowered", "refused") for record in found.values())


def summary(found: Mapping[Cell, Record], wanted: Sequence[Cell]) -> str:
    """Counts, and every cell that did not go well by name."""
    counts = Counter(record["status"] for record in found.values())
    lines = [", ".join(f"{counts[status]} {status}" for status in ("lowered", "refused", "not lowered", "failed"))]
    for cell, record in found.items():
        if record["status"] in ("not lowered", "failed"):
            why = record.get("reason") or f"loss {record['loss_before']:.4f} to {record['loss_after']:.4f}"
            lines.append(f"{cell.name}: {record['status']}: {why}")
        elif record.get("unmoved"):
            lines.append(f"{cell.name}: never moved: {', '.join(record['unmoved'])}")
    if len(found) < len(wanted):
        lines.append(f"{len(wanted) - len(found)} of {len(wanted)} cells have no record")
    return "\n".join(lines)
