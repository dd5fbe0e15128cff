"""The one schema: a constructor's keyword-only arguments, their types and defaults.

An option is written once, in the signature of the class it feeds. `resolve` checks a mapping against that signature and
fills in the defaults; nothing is built or compiled. Ranges are `Annotated` types:

    def __init__(self, width: int, *, num_heads: Positive, dropout: Rate = 0.0, kind: Literal["a", "b"] = "a", rngs)
"""

import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from arch.errors import ConfigError, join, unknown

REQUIRED = object()  # the default of an option that has none


@dataclass(frozen=True)
class Range:
    """Bounds of a number: low <= x <= high, or strict where `above` or `below` is given."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def holds(self, x: float) -> bool:
        return self.low <= x <= self.high and self.above < x < self.below

    def __str__(self) -> str:
        signs = (">= ", self.low), ("<= ", self.high), ("> ", self.above), ("< ", self.below)
        return " and ".join(f"{sign}{value:g}" for sign, value in signs if math.isfinite(value))


Positive = Annotated[int, Range(low=1)]
NonNegative = Annotated[int, Range(low=0)]
PositiveFloat = Annotated[float, Range(above=0, below=math.inf)]
NonNegativeFloat = Annotated[float, Range(low=0)]
Rate = Annotated[float, Range(low=0, below=1)]  # a share that may be nothing but not all: dropout, decay, smoothing


@typing.runtime_checkable
class Subtree(Protocol):
    """A type's metadata that checks a nested mapping: Choice, Named and Section in arch/registry.py."""

    def resolve(self, value: Any, path: str) -> dict[str, Any]: ...

    def fields(self, value: Any, path: str) -> "Mapping[str, Option]": ...


@dataclass(frozen=True)
class Option:
    name: str
    annotation: Any
    default: Any = REQUIRED


@functools.cache
def options(constructor: Callable[..., Any], provided: tuple[str, ...] = ()) -> Mapping[str, Option]:
    """The keyword-only arguments a config may set: all but those the builder provides."""
    function = constructor.__init__ if inspect.isclass(constructor) else constructor
    hints = typing.get_type_hints(function, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in provided:
            if name not in hints:
                raise TypeError(f"{constructor.__qualname__}: option {name} has no type")
            default = REQUIRED if parameter.default is inspect.Parameter.empty else parameter.default
            found[name] = Option(name, hints[name], default)
    return types.MappingProxyType(found)


def subtree(annotation: Any) -> Subtree | None:
    """The checker of a nested mapping behind an annotation, if it is one."""
    if typing.get_origin(annotation) is Annotated:
        return next((extra for extra in annotation.__metadata__ if isinstance(extra, Subtree)), None)
    return None


def resolve(entry: Mapping[str, Any], known: Mapping[str, Option], path: str) -> dict[str, Any]:
    """The entry checked against `known`, in their order, defaults filled in. Raises ConfigError."""
    for key in entry:
        if key not in known:
            raise unknown(join(path, str(key)), key, known, "key")
    resolved = {}
    for name, option in known.items():
        here = join(path, name)
        if name in entry:
            resolved[name] = check(entry[name], option.annotation, here)
        elif option.default is not REQUIRED:
            resolved[name] = check(option.default, option.annotation, here)
        elif (nested := subtree(option.annotation)) is not None:
            resolved[name] = nested.resolve({}, here)
        else:
            raise ConfigError(here, f"missing; give it {describe(option.annotation)}")
    return resolved


def check(value: Any, annotation: Any, path: str) -> Any:
    """The value as the annotation's type, or ConfigError. A whole number serves as a float, a list as a tuple."""
    nested = subtree(annotation)
    if nested is not None:
        return nested.resolve(value, path)
    ok, result = _matches(value, annotation)
    if not ok:
        if typing.get_origin(annotation) is Literal and isinstance(value, str):
            raise unknown(path, value, [str(x) for x in typing.get_args(annotation)], "choice")
        raise ConfigError(path, f"expected {describe(annotation)}, got {value!r}")
    return result


def _matches(value: Any, annotation: Any) -> tuple[bool, Any]:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        ok, value = _matches(value, args[0])
        return ok and all(extra.holds(value) for extra in args[1:] if isinstance(extra, Range)), value
    if origin in (typing.Union, types.UnionType):
        for arg in args:
            ok, result = _matches(value, arg)
            if ok:
                return True, result
        return False, value
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args), value
    if origin is tuple:
        return _matches_tuple(value, args)
    if annotation is float:
        ok = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
        return ok, float(value) if ok else value
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if annotation in (None, types.NoneType):
        return value is None, value
    if annotation in (str, bool):
        return isinstance(value, annotation), value
    raise TypeError(f"config options cannot be of type {annotation}")


def _matches_tuple(value: Any, args: tuple[Any, ...]) -> tuple[bool, Any]:
    if not isinstance(value, tuple | list):
        return False, value
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(args) != len(value):
        return False, value
    pairs = [_matches(item, arg) for item, arg in zip(value, args)]
    return all(ok for ok, _ in pairs), tuple(item for _, item in pairs)


def describe(annotation: Any) -> str:
    """The type in words, for messages."""
    if subtree(annotation) is not None:
        return "a section"
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        bounds = " ".join(str(extra) for extra in args[1:] if isinstance(extra, Range))
        return f"{describe(args[0])} {bounds}".strip()
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return " or ".join(repr(arg) for arg in args)
    if origin is tuple:
        inside = describe(args[0]) if len(args) == 2 and args[1] is Ellipsis else ", ".join(map(describe, args))
        return f"a tuple of ({inside})"
    names = {int: "a whole number", float: "a number", str: "a string", bool: "True or False", types.NoneType: "None"}
    return names.get(annotation, str(annotation))


def names_of(constructor: Callable[..., Any]) -> Collection[str]:
    """Every argument a constructor takes."""
    function = constructor.__init__ if inspect.isclass(constructor) else constructor
    return inspect.signature(function).parameters.keys()
