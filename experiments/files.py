"""Small files that are either whole or not there."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any, *, indent: int | None = None) -> None:
    """Writes a temporary file beside `path`, flushes it to disk and renames it over."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=indent)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file; a last line that was cut off by a kill is not one of them."""
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return


def keep_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Replaces a JSON lines file by these lines, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(temporary, path)
