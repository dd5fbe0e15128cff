"""Token ids as text, for people: a task that can has spell(ids), one string a token."""

from collections.abc import Iterable
from typing import Any


def spell(task: Any, ids: Iterable[int]) -> list[str]:
    """The task's own spelling, else the ids as numbers."""
    ids = [int(i) for i in ids]
    return task.spell(ids) if hasattr(task, "spell") else [str(i) for i in ids]


def from_bytes(ids: Iterable[int]) -> list[str]:
    """Ids that are a byte and 1: a character of ASCII, a line's end, or a dot for any other byte."""
    return [chr(i - 1) if 32 <= i - 1 < 127 else "\n" if i - 1 == 10 else "·" for i in ids]
