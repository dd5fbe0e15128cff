"""Ops over a mesh: each device runs its own rows and heads.

The compiler cannot partition kernels, nor loops over rows and heads without communication.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

logger = logging.getLogger("archloom")
_logged: set[str] = set()

MESH_AXES = {"B": ("data", "fsdp"), "H": ("tensor",)}  # batch; heads or channels


@dataclass(frozen=True)
class Axes:
    """How an op's arrays are cut: a string an array, a letter a dimension.

    "B" is the batch, over the mesh axes data and fsdp; "H" the heads or channels, over tensor; "." stays whole. So is
    a dimension of size 1, which is broadcast. An argument that is None, or a string that is, passes as it is. Keyword
    arguments are not cut: they hold no arrays of these axes.
    """

    ins: tuple[str | None, ...]
    outs: tuple[str | None, ...] | str  # a string alone: the op returns a lone array


def call(op: str, function: Callable[..., Any], args: Sequence[Any], axes: Axes) -> Any:
    """function(*args), under a mesh of several devices in a shard_map over rows and heads where they divide.

    Where the rows (or heads) do not divide by a mesh axis, and over mesh axes of other names, every device works on
    all of them; that is logged once. Inside a shard_map only the mesh axes that are left are used.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    free = {name: mesh.shape[name] for name, kind in kinds.items() if kind != AxisType.Manual}
    if mesh.empty or not free or all(size == 1 for size in free.values()):
        return function(*args)
    cut = {letter: _cut(op, letter, args, axes.ins, free) for letter in MESH_AXES}
    idle = sorted(set(free) - {name for names in MESH_AXES.values() for name in names if free.get(name, 1) > 1})
    _warn(op, "all of it", [name for name in idle if free[name] > 1])
    present = [n for n, arg in enumerate(args) if arg is not None]
    specs = tuple(_spec(args[n].shape, axes.ins[n], cut, free) for n in present)
    if any(kinds[name] == AxisType.Explicit for name in free):
        args = list(args)
        for n, spec in zip(present, specs):
            args[n] = jax.sharding.reshard(args[n], spec)

    def body(*arrays: Any) -> Any:
        filled: list[Any] = [None] * len(args)
        for n, array in zip(present, arrays):
            filled[n] = array
        return function(*filled)

    if isinstance(axes.outs, str):
        outs: Any = _spec(None, axes.outs, cut, free)
    else:
        outs = tuple(None if letters is None else _spec(None, letters, cut, free) for letters in axes.outs)
    mapped = jax.shard_map(body, in_specs=specs, out_specs=outs, axis_names=set(free), check_vma=False)
    return mapped(*(args[n] for n in present))


def _cut(op, letter, args, ins, free):
    """The mesh axes over which a letter's dimensions are cut: as many of its own as divide all of them."""
    sizes = {
        arg.shape[n]
        for arg, letters in zip(args, ins, strict=True)
        if arg is not None and letters is not None
        for n, each in enumerate(letters)
        if each == letter and arg.shape[n] > 1
    }
    names: list[str] = []
    left: list[str] = []
    count = 1
    for name in MESH_AXES[letter]:
        if free.get(name, 1) == 1:
            continue
        if sizes and all(size % (count * free[name]) == 0 for size in sizes):
            names.append(name)
            count *= free[name]
        else:
            left.append(name)
    _warn(op, f"all {'rows' if letter == 'B' else 'heads'} ({sorted(sizes)} do not divide)", left)
    return tuple(names)


def _spec(shape, letters, cut, free):
    entries = []
    for n, letter in enumerate(letters):
        whole = letter == "." or (shape is not None and shape[n] == 1)
        entries.append(None if whole or not cut[letter] else cut[letter])
    return PartitionSpec(*entries)


def _warn(op, what, names):
    if names:
        message = f"{op}: every device along the mesh axes {names} works on {what}"
        if message not in _logged:
            _logged.add(message)
            logger.warning(message)
