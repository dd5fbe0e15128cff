"""Where every array lives: one mesh, and rules from parameter paths to mesh axes.

A rule is (path regex, axes): the first whose regex is found in a parameter's path, such as
"topology/blocks/0/mixer/qkv/kernel", gives the mesh axes of its dimensions; dimensions left out are replicated. Axes
that start with "..." are those of the last dimensions: one rule serves a kernel [D H] and those stacked by layer or by
expert, [L D H], [E D H], [L E D H]. A path without a rule, a rule that decides nothing, and a dimension that does
not divide are errors. Everything that follows a parameter (optimiser moments, averaged parameters) has the parameter's
path as the end of its own, and its sharding.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from arch.errors import ConfigError

log = logging.getLogger("archloom")

AXES = ("data", "fsdp", "tensor", "sequence")
LAST = ("...",)  # in front of axes: they are those of the last dimensions
Rules = Sequence[tuple[str, Sequence[str | Sequence[str] | None]]]

# Column parallel into a block, row parallel out of it: one sum over `tensor` a block, on its way out. `fsdp`
# takes the other dimension. They are for every model, so a dimension that does not divide stays whole, with a warning.
DEFAULT_RULES: Rules = (
    (r"^head/", ()),
    (r"(^|/)(qkv|q|k|v|query|key|value|up|gate|in)/kernel$", ("...", "fsdp", "tensor")),
    (r"(^|/)(out|down)/kernel$", ("...", "tensor", "fsdp")),
    (r"(^|/)(embed|embedding|tokens)(/|$)", ("tensor", "fsdp")),
    (r"", ()),
)


def path_of(keys: Sequence[Any]) -> str:
    """A key path of jax.tree as "a/b/0"."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def paths(tree: Any) -> dict[str, Any]:
    """Leaves by path, in tree order."""
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a config's `mesh` section over all devices, or those given. One size may be -1: what is left."""
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = {axis: sizes[axis] for axis in AXES}
    free = [axis for axis in AXES if sizes[axis] == -1]
    if len(free) > 1:
        raise ConfigError(f"mesh.{free[1]}", f"mesh.{free[0]} is -1 too; only one axis can take what is left")
    fixed = prod(size for size in sizes.values() if size != -1)
    if fixed < 1 or len(devices) % fixed or (not free and fixed != len(devices)):
        product = " x ".join(f"{axis} {sizes[axis]}" for axis in AXES)
        raise ConfigError(
            "mesh", f"{product} does not fill {len(devices)} devices; set one axis to -1 or match the count"
        )
    shape = tuple(len(devices) // fixed if sizes[axis] == -1 else sizes[axis] for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def parameter_specs(params: Any, rules: Rules, mesh: Mesh) -> dict[str, P]:
    """The PartitionSpec of each parameter path. `rules` empty means DEFAULT_RULES. params may be abstract."""
    own = bool(rules)
    compiled = [_compile(i, rule) for i, rule in enumerate(rules or DEFAULT_RULES)]
    used: set[int] = set()
    specs = {}
    for path, leaf in paths(params).items():
        hits = [i for i, (regex, _) in enumerate(compiled) if regex.search(path)]
        if not hits:
            raise ConfigError("sharding", f"no rule matches {path}; end with ('.*', ()) to replicate what is left")
        used.add(hits[0])
        at = f"sharding.{hits[0]}" if own else None
        axes = compiled[hits[0]][1]
        if axes[:1] == (LAST,):
            axes = ((),) * (len(leaf.shape) + 1 - len(axes)) + axes[1:]
        specs[path] = _spec(at, path, leaf.shape, axes, mesh)
    if own and len(used) < len(compiled):
        i = min(set(range(len(compiled))) - used)
        raise ConfigError(
            f"sharding.{i}", f"{compiled[i][0].pattern!r} decides no parameter; correct, move or remove it"
        )
    return specs


def _compile(i: int, rule: tuple[str, Any]) -> tuple[re.Pattern[str], tuple[tuple[str, ...], ...]]:
    pattern, axes = rule
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"sharding.{i}", f"{pattern!r} is not a regular expression: {error}") from error
    named = tuple(() if a is None else (a,) if isinstance(a, str) else tuple(a) for a in axes)
    flat = [axis for entry in named[named[:1] == (LAST,) :] for axis in entry]
    for axis in flat:
        if axis not in AXES:
            raise ConfigError(
                f"sharding.{i}", f"{axis!r} is not a mesh axis; they are {', '.join(AXES)}, and '...' may stand first"
            )
        if flat.count(axis) > 1:
            raise ConfigError(f"sharding.{i}", f"{axis!r} is used twice; a mesh axis splits one dimension")
    return regex, named


def _spec(at: str | None, path: str, shape: tuple[int, ...], axes: tuple[tuple[str, ...], ...], mesh: Mesh) -> P:
    """`at` names the config's rule; None is a default rule, which leaves whole what it cannot split."""
    if len(axes) > len(shape):
        if at is None:
            return P()
        raise ConfigError(at, f"{len(axes)} axes for {path}, which has {len(shape)} dimensions {shape}")
    entries: list[tuple[str, ...] | None] = []
    for dimension, names in enumerate(axes):
        ways = prod(mesh.shape[name] for name in names)
        if shape[dimension] % ways and at is None:
            log.warning(
                "%s %s: dimension %d does not divide over %d devices and stays whole", path, shape, dimension, ways
            )
        elif shape[dimension] % ways:
            raise ConfigError(
                str(at),
                f"{path} {shape}: dimension {dimension} does not divide over {' x '.join(names)} = {ways}; "
                f"change mesh.{names[0]} or give this path a rule of its own before",
            )
        entries.append(names if names and shape[dimension] % ways == 0 else None)
    return P(*entries)


def state_shardings(state: Any, specs: Mapping[str, P], mesh: Mesh) -> Any:
    """A sharding for every leaf of a train state: that of the parameter whose path ends its own, else replicated."""

    def of(keys: Sequence[Any], leaf: Any) -> NamedSharding:
        parts = path_of(keys).split("/")
        tails = ("/".join(parts[i:]) for i in range(len(parts)))  # the longest first
        spec = next((specs[tail] for tail in tails if tail in specs), P())
        return NamedSharding(mesh, spec if len(spec) <= leaf.ndim else P())

    return jax.tree_util.tree_map_with_path(of, state)


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """Examples over data and fsdp, tokens over sequence; of a pair's [B 2 T] and of images nothing but the examples."""

    def of(x: Any) -> NamedSharding:
        axes = (("data", "fsdp"), "sequence")[: x.ndim] if x.ndim <= 2 else (("data", "fsdp"),)
        return NamedSharding(mesh, P(*axes))

    return jax.tree.map(of, batch)


def check_batch(
    mesh: Mesh, *, batch_size: int, length: int | None, accumulate: int = 1, field: str = "train.batch_size"
) -> None:
    """Refuses a batch that the mesh does not divide."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (ways * accumulate):
        parts = f"data x fsdp = {ways} devices" + (f" x {accumulate} microbatches" if accumulate > 1 else "")
        raise ConfigError(field, f"{batch_size} does not divide over {parts}; use a multiple of {ways * accumulate}")
    if length is None and mesh.shape["sequence"] > 1:
        raise ConfigError("mesh.sequence", "images are not split over devices; use 1")
    if length is not None and length % mesh.shape["sequence"]:
        raise ConfigError("mesh.sequence", f"{mesh.shape['sequence']} does not divide the length {length}")
