"""Floating-point operations of a function, counted on its jaxpr: nothing is compiled or run.

Conventions, those of XLA's cost analysis where it is exact: a matrix product of [M K] and [K N] is 2 M N K; an
elementwise arithmetic operation or comparison 1 a result; a reduction its inputs less its outputs; exp, log, tanh and
their like are counted apart, as transcendentals. What XLA gets wrong or leaves open is counted so:
  a loop body is counted once an iteration (XLA counts it once in all), a branch as its dearest side;
  a Fourier transform of N points is 5 N log2 N; a Pallas kernel is what its CostEstimate says;
  moving, casting, gathering, sorting and random bits are not arithmetic and count nothing.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

ELEMENTWISE = frozenset(
    "add sub mul div rem max min neg abs sign floor ceil round square integer_pow clamp select_n nextafter is_finite "
    "eq ne lt le gt ge add_any real imag complex conj".split()
)
TRANSCENDENTAL = frozenset(
    "exp exp2 expm1 log log1p logistic pow sqrt rsqrt cbrt tanh tan sin cos atan2 asin acos atan sinh cosh asinh acosh "
    "atanh erf erfc erf_inv lgamma digamma".split()
)
REDUCE = frozenset("reduce_sum reduce_max reduce_min reduce_prod argmax argmin".split())
CUMULATIVE = frozenset("cumsum cumprod cummax cummin cumlogsumexp".split())
PRODUCTS = frozenset(("dot_general", "conv_general_dilated"))
DEPTHWISE = "depthwise"  # the name scope of a convolution that is written as shifted products and sums


@dataclass
class Cost:
    """Counts, and the flops by name scope (jax.named_scope) such as "topology/blocks/0/mixer"."""

    flops: float = 0.0
    transcendentals: float = 0.0
    products: float = 0.0  # the flops of matrix products and convolutions: twice the multiply-accumulates (MACs)
    scopes: Counter[str] = field(default_factory=Counter)
    times: dict[str, float] = field(default_factory=dict)  # how often a scope runs: the trip counts around it
    product_scopes: Counter[str] = field(default_factory=Counter)  # of the products alone


def count(function: Callable[..., Any], *args: Any) -> Cost:
    """The cost of one call, of the whole of it under any mesh. args are arrays or ShapeDtypeStructs."""
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):  # else ops show one device's share
        jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    cost = Cost()
    for equation, times, scope in _walk(jaxpr, 1.0, ""):
        flops, transcendentals = _equation(equation)
        cost.flops += times * flops
        cost.transcendentals += times * transcendentals
        if equation.primitive.name in PRODUCTS or DEPTHWISE in scope.split("/"):
            cost.products += times * flops
            cost.product_scopes[scope] += times * flops  # type: ignore[assignment]
        cost.scopes[scope] += times * flops  # type: ignore[assignment]  # a Counter of floats
        cost.times[scope] = min(cost.times.get(scope, times), times)
    return cost


def _walk(jaxpr: Any, times: float, scope: str) -> Iterator[tuple[Any, float, str]]:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        here = "/".join(part for part in (scope, str(equation.source_info.name_stack)) if part)
        if name == "while":
            raise NotImplementedError(
                "FLOPs of a while loop without a fixed trip count are unknown; use lax.scan or Python bounds"
            )
        if name == "cond":
            sides = [list(_walk(branch.jaxpr, times, here)) for branch in equation.params["branches"]]
            yield from max(sides, key=lambda side: sum(_equation(e)[0] * n for e, n, _ in side))
            continue
        inner = [] if name == "pallas_call" else list(_inner(equation))
        if not inner:
            yield equation, times, here
        for body in inner:
            yield from _walk(body, times * equation.params.get("length", 1) if name == "scan" else times, here)


def _inner(equation: Any) -> Iterator[Any]:
    """The jaxpr that a call-like equation runs. Rules of differentiation are already applied, or not wanted."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        body = equation.params.get(key)
        if body is not None:
            yield getattr(body, "jaxpr", body)
            return


def _equation(equation: Any) -> tuple[float, float]:
    """Flops and transcendentals of one primitive."""
    name, params = equation.primitive.name, equation.params
    inputs, outputs = [v.aval for v in equation.invars], [v.aval for v in equation.outvars]
    size = float(sum(math.prod(out.shape) for out in outputs if hasattr(out, "shape")))
    if name == "pallas_call":
        estimate = params.get("cost_estimate")
        if estimate is None:
            raise NotImplementedError(f"the kernel {params.get('name')} has no cost_estimate; give pallas_call one")
        return float(estimate.flops), float(estimate.transcendentals)
    if name == "fft":
        lengths = params["fft_lengths"]
        points = math.prod(inputs[0].shape[: -len(lengths)]) * math.prod(lengths)
        return 5.0 * points * math.log2(max(math.prod(lengths), 1)), 0.0
    if not _floating(inputs):
        return 0.0, 0.0
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        return 2.0 * size * math.prod(inputs[0].shape[axis] for axis in contract), 0.0
    if name == "conv_general_dilated":
        kernel = inputs[1].shape
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * size * math.prod(kernel) / features, 0.0
    if name in TRANSCENDENTAL:
        return 0.0, size
    if name in ELEMENTWISE:
        return size, 0.0
    if name in REDUCE:
        return float(math.prod(inputs[0].shape)) - size, 0.0
    if name in CUMULATIVE:
        return size, 0.0
    return 0.0, 0.0


def _floating(avals: list[Any]) -> bool:
    return any(jnp.issubdtype(a.dtype, jnp.inexact) for a in avals if hasattr(a, "dtype"))
