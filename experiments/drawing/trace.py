"""One forward pass on shapes, as the tree of the modules' calls."""

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from arch import accounting, flops, registry
from arch.layers import Dropout
from arch.model import Functional, functional, to_nested
from arch.registry import Registry
from arch.spec import Spec
from arch.topologies.block import DropPath

SILENT = (Dropout, DropPath)  # identities of a model that is not trained
WORDS = {"num_heads": "{} heads", "num_experts": "{} experts", "kv_heads": "{} key-value heads", "top_k": "top {}"}
METHODS = ("__call__", "read")  # what runs a module in a forward pass
HIDDEN = ("dropout", "implementation", "eps")  # options that say nothing of the form
MADE, PATH = (
    "drawn_made",
    "drawn_path",
)  # attributes that a traced module gets; its copies under scan and remat keep them
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Made:
    """What the config said of a component."""

    what: str  # of its registry: "mixer"
    name: str
    path: str  # of its section: "parts.full"
    detail: str  # its options where they differ from the defaults

    @property
    def part(self) -> str | None:
        _, _, name = self.path.partition("parts.")
        return name if name and "." not in name else None


@dataclass
class Call:
    """A module's call: what went in and out, and the calls within."""

    number: int
    path: str
    module: Any
    inputs: list[Shape] = field(default_factory=list)  # of real numbers: one that reads another set has two
    output: Shape = ()
    inner: dict[str, Shape] = field(default_factory=dict)  # its parameters as they are within a scan, by relative path
    runs: int = 1  # how often it runs: the trip counts of the scans around it
    within: list["Call"] = field(default_factory=list)
    own: dict[str, Shape] = field(default_factory=dict)  # parameters that no call within has, by relative path
    flops: float = 0.0  # inside, calls within included

    @property
    def made(self) -> Made | None:
        return getattr(self.module, MADE, None)

    @property
    def takes(self) -> Shape:
        return self.inputs[0] if self.inputs else ()

    @property
    def kind(self) -> type:
        return type(self.module)


def trace(model: Mapping[str, Any], spec: Spec) -> Call:
    """The calls of a config's section `model` on one example of a task, the model's own at the root."""
    with registry.watched(_note):
        net = functional(model, spec)
    params = net.abstract()
    recorder = Recorder()
    cost = flops.count(functools.partial(_run, net, recorder), params, accounting._inputs(spec))
    (root,) = recorder.root.within
    _count(root, cost)
    _own(root, _shapes(params))
    return root


def _shapes(params: Any) -> dict[str, Shape]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


def _real(a: Any) -> bool:
    return isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jnp.floating)


def _note(where: Registry, path: str, name: str, entry: Mapping[str, Any], made: Any) -> None:
    if isinstance(made, nnx.Module):
        setattr(made, MADE, Made(where.what, name, path, _detail(where, name, entry)))


def _detail(where: Registry, name: str, entry: Mapping[str, Any]) -> str:
    options, found = where.options(name), []
    for key, value in sorted(entry.items(), key=lambda item: item[0] not in WORDS):
        if key not in options or key in HIDDEN or value is None:
            continue
        if isinstance(value, Mapping):  # a wrapper's mixer
            found.append(str(value.get("kind", value.get("name", key))))
        elif key == "num_heads" or value != options[key].default:
            if key in WORDS:
                found.append(WORDS[key].format(value))
            else:
                short = f"{value:g}" if isinstance(value, float) else str(value)
                words = key.replace("_", " ")
                found.append(
                    {True: words, False: f"no {words}"}[value] if isinstance(value, bool) else f"{words} {short}"
                )
    return ", ".join(found)


def _run(net: Functional, recorder: "Recorder", params: Any, inputs: Any) -> Any:
    module = net.module(params)
    for keys, inner in nnx.iter_modules(module):
        setattr(inner, PATH, "/".join(map(str, keys)))  # static: it outlives the copies that scan and remat make
    conditions = {name: jnp.zeros(x.shape, x.dtype) for name, x in net.conditions(inputs.shape[0]).items()}
    with recorder.listening(module):
        return module(inputs, **conditions)


class Recorder:
    """Writes down the calls of a module and of those within it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.root = Call(-1, "", None)
        self._open = [self.root]

    @contextlib.contextmanager
    def listening(self, module: nnx.Module) -> Iterator[None]:
        """Replaces the METHODS of the modules' classes; puts them back at the end."""
        classes = {type(inner) for _, inner in nnx.iter_modules(module)}
        methods = [(each, name) for each in classes for name in METHODS if hasattr(each, name)]
        before: dict[Any, Any] = {(each, name): vars(each).get(name) for each, name in methods}
        functions: dict[Any, Any] = {
            (each, name): getattr(each, name) for each, name in methods
        }  # before any is replaced
        try:
            for (each, name), function in functions.items():
                setattr(each, name, self._recorded(function))
            yield
        finally:
            for (each, name), function in before.items():
                if function is None:
                    delattr(each, name)
                else:
                    setattr(each, name, function)

    def _recorded(self, function: Any) -> Any:
        @functools.wraps(function)
        def call(module: Any, *args: Any, **options: Any) -> Any:
            outer = self._open[-1]
            path = getattr(module, PATH, None)
            if (
                path is None
                or isinstance(module, SILENT)
                or closed(outer)
                or (outer.number >= 0 and outer.path == path)
            ):
                return function(module, *args, **options)
            made = Call(len(self.calls), path, module, [a.shape for a in (*args, *options.values()) if _real(a)])
            made.inner = _shapes(to_nested(nnx.state(module, nnx.Param)))
            self.calls.append(made)
            outer.within.append(made)
            self._open.append(made)
            try:
                with jax.named_scope(f"call{made.number}."):
                    result = function(module, *args, **options)
            finally:
                self._open.pop()
            made.output = next((a.shape for a in jax.tree.leaves(result) if isinstance(a, jax.Array)), ())
            return result

        return call


def closed(call: Call) -> bool:
    """A component of the config is one box, whatever is in it; only topologies are looked into."""
    return call.number >= 0 and (
        (call.made is not None and call.made.what != "topology") or call.kind.__module__.startswith("flax.")
    )


def _count(root: Call, cost: flops.Cost) -> None:
    """FLOPs and runs of every call, from the scopes that bear its number."""
    inside: dict[int, float] = {}
    runs: dict[int, float] = {}
    for scope, times in cost.times.items():
        for number in {int(n) for n in re.findall(r"call(\d+)\.", scope)}:
            inside[number] = inside.get(number, 0.0) + cost.scopes[scope]
            runs[number] = min(runs.get(number, times), times)

    def fill(call: Call, outer: int) -> None:
        call.flops, call.runs = inside.get(call.number, 0.0), int(runs.get(call.number, outer))
        for each in call.within:
            fill(each, call.runs)

    fill(root, 1)


def _own(root: Call, leaves: Mapping[str, Shape]) -> None:
    """Gives every parameter to the call with the longest path that it lies under: its caller may have another path."""
    calls: dict[str, list[Call]] = {}

    def collect(call: Call) -> None:
        calls.setdefault(call.path, []).append(call)
        for each in call.within:
            collect(each)

    collect(root)
    for leaf, shape in leaves.items():
        keys = leaf.split("/")
        owner = next(path for n in range(len(keys), -1, -1) if (path := "/".join(keys[:n])) in calls)
        for call in calls[owner]:
            call.own[leaf.removeprefix(owner).lstrip("/")] = shape
