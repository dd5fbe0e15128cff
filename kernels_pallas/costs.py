"""What each op costs, as closed formulas: floating-point operations, bytes to and from memory, transcendentals.

They feed the kernels' CostEstimate, which XLA schedules by and which arch/flops.py counts for a kernel; so a model has
the same cost in a plan, in an MFU and in a table. Letters: B batch, T query tokens, S key tokens, H heads, G key-value
heads, K key width, V value width, D channels, N states a channel, C tokens a chunk, e bytes an element.

Counted is what the chunkwise forms compute: whole [C C] tiles, 2 m n k for a product, one for a vector operation a
result. `backward` is what follows the forward pass, its recomputation included. Bytes are those that must move, each
array once; float32 gates and states beside inputs of e bytes.
"""

from dataclasses import dataclass
from math import log2
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

STATE = 4  # bytes of a float32


@dataclass(frozen=True)
class Cost:
    flops: float = 0.0
    bytes: float = 0.0
    transcendentals: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.transcendentals + other.transcendentals)

    def estimate(self, kernels: int = 1) -> pl.CostEstimate:
        """For pallas_call; for each one of so many kernels that share the work."""
        flops, moved, transcendentals = (x / kernels for x in (self.flops, self.bytes, self.transcendentals))
        return pl.CostEstimate(flops=round(flops), bytes_accessed=round(moved), transcendentals=round(transcendentals))

    def seconds(self, flops: float, bandwidth: float) -> float:
        """The roofline's floor on a device of so many FLOP/s and bytes/s."""
        return max(self.flops / flops, self.bytes / bandwidth)


def nbytes(*arrays: Any) -> int:
    """Of arrays, or of anything with a size and a dtype; None counts nothing."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in arrays if x is not None)


def linear_attention(
    B: int, T: int, H: int, K: int, V: int, *, chunk: int, decay: str | None, itemsize: int, backward: bool = False
) -> Cost:
    """decay: None, "head" (one a head) or "channel" (one a key channel). Per token and head forward 2 C (K + V) for
    the pairs of a chunk, 4 K V for the state; backward 2 C (3 K + 2 V) and 10 K V."""
    tokens, c = B * T * H, min(chunk, T)
    gates = {None: 0, "head": 1, "channel": K}[decay]
    exponentials = {None: 0, "head": c + 2, "channel": 4 * K}[decay]
    scaled = {None: 0, "head": c + 2 * K, "channel": 6 * K}[decay]  # products with a decay
    states = 2 * STATE * B * H * K * V
    if not backward:
        flops = tokens * (2 * c * (K + V) + 4 * K * V + scaled)
        return Cost(flops, tokens * (2 * itemsize * (K + V) + STATE * gates) + states, tokens * exponentials)
    flops = tokens * (2 * c * (3 * K + 2 * V) + 10 * K * V + 3 * scaled)
    moved = tokens * (itemsize * (4 * K + 3 * V) + 2 * STATE * gates)
    return Cost(flops, moved + states + STATE * B * H * K * V * -(-T // c), tokens * exponentials)


def delta_rule(
    B: int, T: int, H: int, K: int, V: int, *, chunk: int, gated: bool, itemsize: int, backward: bool = False
) -> Cost:
    """Per token and head forward 2 C (2 K + V) + 2 C V for the pairs, 6 K V for the state, and the inverse of a
    [C C] triangle by blocks, C^2 / 3 multiply-adds twice over."""
    tokens, c = B * T * H, min(chunk, T)
    inverse = 2 * c * c / 3
    exponentials = tokens * (c + 2) if gated else 0
    scaled = 2 * c + 2 * K if gated else c
    states = 2 * STATE * B * H * K * V
    gates = STATE * (1 + gated)
    if not backward:
        flops = tokens * (2 * c * (2 * K + 2 * V) + 6 * K * V + inverse + scaled)
        return Cost(flops, tokens * (2 * itemsize * (K + V) + gates) + states, exponentials)
    flops = tokens * (2 * c * (6 * K + 5 * V) + 16 * K * V + 3 * inverse + 4 * scaled)
    moved = tokens * (itemsize * (4 * K + 3 * V) + 2 * gates)
    return Cost(flops, moved + states + itemsize * B * H * K * V * -(-T // c), exponentials)


def attention(
    B: int,
    H: int,
    G: int,
    T: int,
    S: int,
    K: int,
    V: int,
    *,
    scores: float,
    itemsize: int,
    backward: bool = False,
    fused: bool = True,
) -> Cost:
    """scores: entries of the score map that are computed, a head and row of the batch (see `visible`). Forward
    2 scores (K + V), one exponential a score; backward 2 scores (3 K + 2 V) in one kernel, 2 scores (4 K + 3 V) in
    two. About 5 vector operations a score for the softmax, 6 for its gradient."""
    moved = itemsize * (B * H * T * (K + V) + B * G * S * (K + V)) + STATE * B * H * T
    products = (K + V) if not backward else (3 * K + 2 * V) if fused else (4 * K + 3 * V)
    flops = B * H * scores * (2 * products + (6 if backward else 5))
    return Cost(flops, moved * (2 if backward else 1), B * H * scores * (1 if fused or not backward else 2))


def visible(T: int, S: int, *, left: int | None, right: int | None) -> int:
    """Pairs of a query t and a key s with -left <= s - (t + S - T) <= right; None is no bound."""
    at = np.arange(T) + (S - T)
    first = np.zeros_like(at) if left is None else np.maximum(at - left, 0)
    last = np.full_like(at, S - 1) if right is None else np.minimum(at + right, S - 1)
    return int(np.maximum(last - first + 1, 0).sum())


def selective_scan(B: int, T: int, D: int, N: int, *, itemsize: int, backward: bool = False) -> Cost:
    """Per token and channel forward 7 N operations and N exponentials; backward, with the states computed again,
    20 N and N."""
    size = B * T * D
    inputs = itemsize * (2 * size + 2 * B * T * N)
    states = STATE * (D * N + 2 * B * D * N)
    if not backward:
        return Cost(7 * size * N, inputs + itemsize * size + states, size * N)
    return Cost(20 * size * N, 2 * inputs + itemsize * size + 2 * states, size * N)


def linear_recurrence(
    size: int, state: int, *, itemsize: int, is_complex: bool = False, backward: bool = False
) -> Cost:
    """size: elements of b. A multiply-add each forward; backward one for the adjoint and a product for da."""
    work, planes = (8, 2) if is_complex else (2, 1)
    arrays = 5 if backward else 3
    extra = 1.5 if backward else 1.0
    return Cost(work * extra * size, planes * itemsize * (arrays * size + 2 * state), 0)


def long_conv(B: int, T: int, D: int, *, itemsize: int, backward: bool = False) -> Cost:
    """By FFT: real transforms of 2 T points, 2.5 n log2 n operations each, of x and y, of the filter once."""
    n = 2 * T
    transform = 2.5 * n * log2(max(n, 2))
    rows = B * D
    if not backward:
        return Cost(transform * (2 * rows + D) + 6 * T * rows, itemsize * 2 * rows * T + itemsize * D * T)
    flops = transform * (3 * rows + 2 * D) + 12 * T * rows
    return Cost(flops, itemsize * 3 * rows * T + 2 * itemsize * D * T)


def long_conv_products(
    B: int, T: int, D: int, *, factors: tuple[int, int], parts: int, itemsize: int, backward: bool = False
) -> Cost:
    """By DFTs as matrix products, n1 n2 >= T points: 2 n (2 n1 + 4 n2) operations a transform, times the pairs of
    `parts` bfloat16 numbers; there and back, the filter's once. Backward three of a row, two of the filter."""
    n1, n2 = factors
    transform = 2 * n1 * n2 * (2 * n1 + 4 * n2) * parts * (parts + 1) / 2
    rows, filters = (3 * B, 2) if backward else (2 * B, 1)
    moved = itemsize * (3 if backward else 2) * B * D * T + STATE * filters * D * T
    return Cost(transform * (rows + filters) * D, moved)


def decode_attention(B: int, H: int, G: int, S: int, K: int, V: int, *, itemsize: int) -> Cost:
    """One query against S cached keys: the cache is read once."""
    moved = itemsize * (B * G * S * (K + V) + B * H * (K + V))
    return Cost(B * H * S * (2 * (K + V) + 5), moved, B * H * S)


def causal_conv(B: int, T: int, D: int, W: int, *, silu: bool, itemsize: int, backward: bool = False) -> Cost:
    """A depthwise convolution of W taps: 2 W a token and channel; backward twice that, the forward again for silu."""
    size = B * T * D
    passes = (2 + silu) if backward else 1
    moved = itemsize * size * (3 if backward else 2) + STATE * D * W * (2 if backward else 1)
    return Cost(2 * W * passes * size + (4 * size if silu else 0), moved, size if silu else 0)
