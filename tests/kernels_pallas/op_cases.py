"""Every op as a function of arrays alone, with arguments made to size: for tests of what all ops have in common."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.attention import attention
from kernels_pallas.delta_rule import delta_rule
from kernels_pallas.linear_attention import linear_attention
from kernels_pallas.linear_recurrence import linear_recurrence
from kernels_pallas.long_conv import long_conv
from kernels_pallas.selective_scan import selective_scan


@dataclass(frozen=True)
class OpCase:
    """function(*arrays) -> y. shapes and axes: one an array; the letters B T H D N are sizes, K that of a head.

    In axes "." stays whole, as in kernels_pallas.sharded. `rest` are arrays that vmap may leave alone.
    """

    function: Callable[..., Any]
    axes: tuple[str, ...]  # of each array, "BTHK"; lower case: not over a mesh, nor vmapped
    small: tuple[int, ...] = ()  # which arrays are decays: made at most 0

    def shapes(self, B: int, T: int, H: int, K: int) -> list[tuple[int, ...]]:
        sizes = {"b": B, "t": T, "h": H, "k": K, "d": H * K, "n": 16}
        return [tuple(sizes[letter.lower()] for letter in letters) for letters in self.axes]

    def arrays(self, B: int, T: int, H: int, K: int, dtype: Any = jnp.float32) -> list[jax.Array]:
        keys = jax.random.split(jax.random.key(0), len(self.axes))
        made = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, self.shapes(B, T, H, K))]
        return [-jnp.abs(x) if n in self.small else x / 2 for n, x in enumerate(made)]


def _first(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda *arrays: function(*arrays, **options)[0]


def _scan(u, delta, A, B, C, D):
    return selective_scan(u, -delta, A, B, C, D)[0]


def _recurrence(a, b):
    return linear_recurrence(jnp.exp(a), b)[0]


QKV = ("BTHK", "BTHK", "BTHK")
CASES = {
    "attention": OpCase(functools.partial(attention, causal=True), QKV),
    "attention_window": OpCase(functools.partial(attention, causal=True, window=(255, 0)), QKV),
    "linear_attention": OpCase(_first(linear_attention), QKV),
    "linear_attention_head": OpCase(_first(linear_attention), (*QKV, "BTH"), (3,)),
    "linear_attention_channel": OpCase(_first(linear_attention), (*QKV, "BTHK"), (3,)),
    "delta_rule": OpCase(_first(delta_rule), (*QKV, "BTH")),
    "delta_rule_gated": OpCase(_first(delta_rule), (*QKV, "BTH", "BTH"), (4,)),
    "selective_scan": OpCase(_scan, ("BTD", "BTD", "Dn", "BTn", "BTn", "D"), (1, 2)),
    "linear_recurrence": OpCase(_recurrence, ("BTD", "BTD"), (0,)),
    "long_conv": OpCase(long_conv, ("BTD", "tD")),
}


def gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """(y, its gradients) of all arrays for the cotangent cos y, which is none of the arrays'."""

    def run(*arrays: Any) -> Any:
        y, pull = jax.vjp(function, *arrays)
        return y, *pull(jnp.cos(y))

    return run
