"""What scripts/bench_kernels.py measures on a CPU: a module an op, each with a list CASES.

A side is a function that imports its framework itself, makes its inputs and returns (step, facts): step() runs forward
and backward once and returns arrays, the same ones in the same order on every side of a case that compares; facts are
figures to record, such as temp_bytes. Sides of jax and of torch run in processes of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Prepared = tuple[Callable[[], list[Any]], dict[str, Any]]


@dataclass(frozen=True)
class Side:
    make: Callable[[], Prepared]
    framework: str = "jax"  # or "torch"


@dataclass(frozen=True)
class Case:
    """Sides by name; the first is ours, and each other's ratio is its seconds by ours. goal is the ratio to reach."""

    name: str
    sides: dict[str, Side]
    goal: str = ""  # in words, printed beside the ratio: ">= 1.2"
    tolerance: float | None = 1e-4  # of the arrays' norms; None: the sides do different work


def jax_step(function: Callable[..., Any], *arguments: Any) -> Prepared:
    """A jitted function compiled for its arguments, with the bytes of temporary memory the compiler plans."""
    import jax

    compiled = jax.jit(function).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    facts = {} if memory is None else {"temp_bytes": memory.temp_size_in_bytes}
    return lambda: jax.block_until_ready(jax.tree.leaves(compiled(*arguments))), facts


def gradients(function: Callable[..., Any], cotangent: Any) -> Callable[..., Any]:
    """The gradients of all arguments, for a forward pass whose first (or only) output meets `cotangent`."""
    import jax

    def run(*arguments: Any) -> Any:
        def first(*arguments: Any) -> Any:
            y = function(*arguments)
            return y[0] if isinstance(y, tuple) else y

        return jax.vjp(first, *arguments)[1](cotangent)

    return run
