"""What scripts/bench_kernels.py measures on a GPU: a module an op, each with a list CASES, at the sizes of training.

The inputs are drawn from the case's shapes, the same numbers in every process, and a side gives a function of them; the
benchmark times it (`jax_timer`, `torch_timer`) and compares a sample of its results with the first side's. With `tiny`
a case takes its small shapes, so that the whole path runs on a CPU.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

SAMPLE = 4096  # elements of each result that are compared
CALLS = 20  # at least so many calls one after the other in a measurement, and MILLISECONDS of them
MILLISECONDS = 100.0


@dataclass(frozen=True)
class Array:
    """One input: its shape, and how it is drawn."""

    shape: tuple[int, ...]
    kind: str = "normal"  # "normal", "unit" (length 1 along the last axis), "uniform", "decay" (-0.1 times uniform)
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Side:
    """make(case options) returns a function of the inputs; it imports its framework itself."""

    make: Callable[..., Callable[..., Any]]
    framework: str = "jax"
    cpu: bool = True  # False: cannot run on a CPU, and tiny leaves it out


@dataclass(frozen=True)
class Case:
    """Sides by name; the first is ours, and each other's ratio is its time by ours."""

    name: str
    inputs: Sequence[Array]
    tiny: Sequence[Array]
    sides: dict[str, Side]
    backward: bool = False
    wrt: Sequence[int] = ()  # the inputs with a gradient; all if empty
    flops: float = 0.0
    bytes: float = 0.0
    goal: str = ""
    tolerance: float | None = 2e-2  # relative RMS of the results between sides; None: the sides do different work
    options: dict[str, Any] = field(default_factory=dict)
    tune: dict[str, Sequence[Any]] = field(default_factory=dict)  # options of the first side to try, by name


def draw(arrays: Sequence[Array], seed: int = 0) -> list[Any]:
    """The inputs as NumPy float32."""
    import numpy as np

    rng = np.random.default_rng(seed)
    found = []
    for array in arrays:
        if array.dtype == "int32":
            found.append(np.full(array.shape, int(array.kind), np.int32))
            continue
        if array.kind in ("uniform", "decay"):
            x = rng.random(array.shape, np.float32) * (-0.1 if array.kind == "decay" else 1.0)
        else:
            x = rng.standard_normal(array.shape, np.float32)
            if array.kind == "unit":
                x /= np.sqrt((x * x).sum(-1, keepdims=True))
        found.append(x.astype(np.float32))
    return found


def sample(x: Any) -> list[float]:
    """Some elements of a NumPy array, the same ones in every process."""
    import numpy as np

    flat = x.reshape(-1)
    return flat[np.random.default_rng(1).integers(0, flat.size, SAMPLE)].astype(np.float64).tolist()


def jax_timer(case: Case, side: Side, tiny: bool) -> tuple[Callable[[], float], list[list[float]]]:
    """(a function that measures the milliseconds of a call, samples of the results).

    The calls follow each other inside one program, each waiting for the last one's results: what Python takes to start
    a program would hide anything below a fifth of a millisecond.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    shapes = case.tiny if tiny else case.inputs
    arguments = [jnp.asarray(x, array.dtype) for x, array in zip(draw(shapes), shapes)]
    function = side.make(**case.options)
    wrt = tuple(case.wrt) or tuple(range(len(arguments)))

    def call(*arguments: Any) -> list[Any]:
        if not case.backward:
            return [jax.tree.leaves(function(*arguments))[0]]

        def first(*some: Any) -> Any:
            filled = list(arguments)
            for n, x in zip(wrt, some):
                filled[n] = x
            return jax.tree.leaves(function(*filled))[0]

        y, pull = jax.vjp(first, *(arguments[n] for n in wrt))
        return [y, *pull(jnp.ones_like(y))]

    def again(_: Any, carry: Any) -> Any:
        arguments, _ = jax.lax.optimization_barrier(carry)
        return arguments, call(*arguments)

    @jax.jit
    def repeat(times: Any, arguments: Any) -> Any:
        zeros = [jnp.zeros(x.shape, x.dtype) for x in jax.eval_shape(call, *arguments)]
        return jax.lax.fori_loop(0, times, again, (arguments, zeros))[1]

    results = jax.jit(call)(*arguments)
    samples = [sample(np.asarray(x.astype(jnp.float32))) for x in results]
    del results

    def measure(times: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(repeat(times, arguments))
        return 1e3 * (time.perf_counter() - start)

    return functools.partial(_enough, measure, tiny), samples


def torch_timer(case: Case, side: Side, tiny: bool) -> tuple[Callable[[], float], list[list[float]]]:
    """As `jax_timer`: on a GPU by its own events around calls that are queued one after the other."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = case.tiny if tiny else case.inputs
    arguments = [
        torch.from_numpy(x).to(device=device, dtype=getattr(torch, array.dtype))
        for x, array in zip(draw(shapes), shapes)
    ]
    function = side.make(**case.options)
    wrt = tuple(case.wrt) or tuple(range(len(arguments)))
    if case.backward:
        for n in wrt:
            arguments[n].requires_grad_()

    def call() -> list[Any]:
        if not case.backward:
            with torch.no_grad():
                y = function(*arguments)
            return [y[0] if isinstance(y, tuple) else y]
        y = function(*arguments)
        y = y[0] if isinstance(y, tuple) else y
        return [y, *torch.autograd.grad(y, [arguments[n] for n in wrt], torch.ones_like(y))]

    samples = [sample(x.detach().float().cpu().numpy()) for x in call()]

    def measure(times: int) -> float:
        if device == "cpu":
            start = time.perf_counter()
            for _ in range(times):
                call()
            return 1e3 * (time.perf_counter() - start)
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        first.record()
        for _ in range(times):
            call()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last)

    return functools.partial(_enough, measure, tiny), samples


def _enough(measure: Callable[[int], float], tiny: bool) -> float:
    """The milliseconds of one call, of enough calls that starting them does not count."""
    once = measure(2) / 2  # compiles and tunes, the first time
    once = once if tiny else measure(2) / 2
    times = 2 if tiny else max(CALLS, round(MILLISECONDS / max(once, 1e-3)))
    return measure(times) / times
