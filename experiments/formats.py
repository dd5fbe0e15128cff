"""Numbers as people read them. None, a number that is not there, is an empty string."""

from collections.abc import Callable
from typing import Any


def percent(value: float | None, unit: str = " %") -> str:
    return "" if value is None else f"{100 * value:.1f}{unit}"


def number(value: Any) -> str:
    """96000 as 96,000; anything else as it is."""
    return f"{value:,}" if type(value) is int else str(value)


def scaled(value: float | None) -> str:
    """Three digits with K, M, G, T."""
    if value is None:
        return ""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def optional(form: Callable[[Any], str], value: Any) -> str:
    return "" if value is None else form(value)


def duration(seconds: float) -> str:
    """90 -> 1 min 30 s."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
