"""The documented shapes of the TPU kernels: a module an op, each with a list CASES.

They feed scripts/tpu_schedule.py (the static schedule), scripts/tune_kernel.py (the search for tiles) and the tests
that compile every kernel for every generation of TPU. Nothing here runs: arguments are shapes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One op at one shape and dtype.

    Args:
      name: unique in its op: "bf16 4x4096x16x128 causal".
      function: of the arguments; returns an array or a tuple of arrays. Keywords are the tile options. The backward
        pass is its jax.vjp, with cotangents for all outputs of a floating dtype.
      arguments: jax.ShapeDtypeStructs. Those of an integer or bool dtype have no gradient.
      per: what a figure is divided by: tokens x heads, or elements.
      bytes_forward, bytes_backward: the least bytes each pass moves: inputs read once, outputs written once.
      options: keyword of function -> the values that scripts/tune_kernel.py tries.
      backward: False where the op has no gradient (decoding).
      record: False leaves the case out of the committed table of schedules: compiled by the tests alone.
      shares: of the grid's steps that run each big predicated region (a pl.when around a tile) of a kernel, by kernel
        name, the largest region first; or a function of the options that returns them. A region not named counts as
        run in every step. scripts/tpu_schedule.py prints the regions there are.
      turns: of the loops inside a kernel whose trip count is not a constant, by kernel name, in the program's order.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    per: float
    bytes_forward: float
    bytes_backward: float
    options: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    backward: bool = True
    record: bool = True
    shares: Mapping[str, Sequence[float]] | Callable[..., Mapping[str, Sequence[float]]] = field(default_factory=dict)
    turns: Mapping[str, Sequence[float]] = field(default_factory=dict)
