"""Names to constructors: the tables a config chooses from, and the checked subtrees that choose."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from arch import schema
from arch.errors import ConfigError, join, nearest, unknown, within

C = TypeVar("C", bound=Callable[..., Any])


class Registry:
    """A table of constructors of one sort. A duplicate or unknown name is an error.

    `provided` names the arguments the builder hands over itself (width, rngs); a config cannot set them, and a
    constructor takes those it names.
    """

    def __init__(self, what: str, *, provided: tuple[str, ...] = ()):
        self.what, self.provided = what, provided
        self._entries: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[C], C]:
        def add(constructor: C) -> C:
            if name in self._entries:
                raise ValueError(f"{self.what} {name!r} is registered twice")
            schema.options(constructor, self.provided)  # an option without a type fails at import, not in a run
            self._entries[name] = constructor
            return constructor

        return add

    def __getitem__(self, name: str) -> Any:
        if name not in self._entries:
            raise unknown("", name, self._entries, self.what)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        return sorted(self._entries)

    def name_of(self, constructor: Any) -> str | None:
        """The name under which a constructor is registered."""
        return next((name for name, entry in self._entries.items() if entry is constructor), None)

    def options(self, name: str) -> Mapping[str, schema.Option]:
        return schema.options(self[name], self.provided)

    def build(self, entry: Mapping[str, Any], *, path: str = "", key: str = "name", **provided: Any) -> Any:
        """The component that `entry` names, from its options and those of `provided` that its constructor takes."""
        constructor = self[entry[key]]
        takes = schema.names_of(constructor)
        given = {name: value for name, value in provided.items() if name in takes}
        with within(path):
            made = constructor(**{k: v for k, v in entry.items() if k != key}, **given)
        if (see := _WATCHER.get()) is not None:
            see(self, path, entry[key], entry, made)
        return made


Seen = Callable[[Registry, str, str, Mapping[str, Any], Any], None]
_WATCHER: ContextVar[Seen | None] = ContextVar("watcher", default=None)


@contextlib.contextmanager
def watched(see: Seen) -> Iterator[None]:
    """Within, see(registry, path, name, entry, component) is told of every component that is built; for diagrams."""
    token = _WATCHER.set(see)
    try:
        yield
    finally:
        _WATCHER.reset(token)


MIXERS = Registry("mixer", provided=("width", "causal", "rotary", "causal_chunk", "max_length", "rngs"))
CHANNEL_MIXERS = Registry("channel mixer", provided=("width", "dropout", "rngs"))
NORMS = Registry("norm", provided=("width", "rngs"))
POSITIONS = Registry("position encoding", provided=("width", "max_length", "rngs"))
EMBEDDINGS = Registry("embedding", provided=("spec", "width", "rngs"))
TOPOLOGIES = Registry("topology", provided=("causal", "dropout", "rotary", "max_length", "grid", "remat", "rngs"))
HEADS = Registry("head", provided=("width", "num_classes", "spec", "embedding", "embedding_width", "rngs"))
TASKS = Registry("task")
OBJECTIVES = Registry("objective", provided=("smoothing", "conditional"))
OPTIMIZERS = Registry("optimizer", provided=("learning_rate",))
SCHEDULES = Registry("schedule", provided=("lr", "steps"))


def require_mapping(value: Any, path: str, example: str) -> Mapping[str, Any]:
    if not hasattr(value, "items"):
        raise ConfigError(path, f"expected a section such as {example}, got {value!r}")
    return value


@dataclass(frozen=True)
class Choice:
    """A section {key: NAME, ...options of the constructor NAME in the registries, ...options of `shared`}."""

    registries: tuple[Registry, ...]
    key: str = "name"
    shared: Callable[..., Any] | None = None
    default: str | None = None  # the name of a section that is left out

    def fields(self, value: Any, path: str) -> Mapping[str, schema.Option]:
        names = [name for registry in self.registries for name in registry.names()]
        what = " or ".join(registry.what for registry in self.registries)
        value = require_mapping(value, path, f'{{"{self.key}": "{names[0] if names else "..."}", ...}}')
        at = join(path, self.key)
        named = schema.Option(self.key, str)
        if self.default is not None:
            named = schema.Option(self.key, str, self.default)
            value = {self.key: self.default, **value}
        if self.key not in value:
            for key in value:
                if nearest(str(key), [self.key]):
                    raise unknown(join(path, str(key)), key, [self.key], "key")
            raise ConfigError(at, f"missing; name the {what}: {', '.join(names)}")
        name = value[self.key]
        if not isinstance(name, str):
            raise ConfigError(at, f"expected the name of a {what}, got {name!r}")
        if name not in names:
            raise unknown(at, name, names, what)
        registry = next(registry for registry in self.registries if name in registry)
        common = schema.options(self.shared, ("rngs",)) if self.shared is not None else {}
        return {self.key: named, **common, **registry.options(name)}

    def resolve(self, value: Any, path: str) -> dict[str, Any]:
        return schema.resolve(value, self.fields(value, path), path)


@dataclass(frozen=True)
class Named:
    """A section of entries with free names, each checked by `choice`: `model.parts`."""

    choice: Choice

    def fields(self, value: Any, path: str) -> Mapping[str, schema.Option]:
        example = '{"mixer": {"kind": "softmax", "num_heads": 4}}'
        if not require_mapping(value, path, example):
            raise ConfigError(path, f"missing; name at least one, as in {example}")
        return {str(name): schema.Option(str(name), Annotated[Mapping, self.choice]) for name in value}

    def resolve(self, value: Any, path: str) -> dict[str, Any]:
        return schema.resolve(value, self.fields(value, path), path)


@dataclass(frozen=True)
class Section:
    """A section of fixed options: the keyword-only arguments of one constructor."""

    constructor: Callable[..., Any]

    def fields(self, value: Any, path: str) -> Mapping[str, schema.Option]:
        require_mapping(value, path, "{option: value}")
        return schema.options(self.constructor)

    def resolve(self, value: Any, path: str) -> dict[str, Any]:
        return schema.resolve(value, self.fields(value, path), path)
