"""Diagonal linear state space models: initial matrices, discretisation, the two ways to run them. No parameters."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Inexact, Int

from arch.ops.long_conv_nd import long_conv_nd
from arch.ops.segments import first_tokens
from kernels_pallas.linear_recurrence import linear_recurrence
from kernels_pallas.precision import exact

Rule = Literal["zoh", "bilinear"]


def hippo_normal(size: int) -> tuple[Complex[np.ndarray, " n"], Complex[np.ndarray, "n n"]]:
    """Eigenvalues of HiPPO-N by rising imaginary part, and its eigenvectors as the columns of a unitary V.

    HiPPO-N is the normal part of HiPPO-LegS, A[n, k] = -sqrt((2n + 1)(2k + 1)) for n > k, -(n + 1) for n = k, else 0:
    N = A + p p^T with p_n = sqrt(n + 1/2), which is -1/2 I plus a skew-symmetric matrix.
    Source: Gu et al. 2022, arXiv:2111.00396, theorem 1; diagonal models: Gupta et al. 2022, arXiv:2203.14343.
    """
    n = np.arange(size)
    root = np.sqrt(n + 0.5)
    below = np.tril(np.outer(root, root), -1)
    skew = below.T - below  # N + 1/2 I
    imaginary, vectors = np.linalg.eigh(-1j * skew)
    return -0.5 + 1j * imaginary, vectors


def log_steps(key: Array, count: int, low: float, high: float) -> Float[Array, " n"]:
    """Logarithms of step sizes, uniform between those of low and high."""
    return jax.random.uniform(key, (count,), minval=math.log(low), maxval=math.log(high))


def discretize(
    eigenvalues: Inexact[Array, "*n"], step: Float[Array, "*n"], rule: Rule
) -> tuple[Inexact[Array, "*n"], Inexact[Array, "*n"]]:
    """h' = lambda h + b u as h_t = exp(r) h_{t-1} + g b u_t: (r, g), with z = step lambda.

    zoh (the input held over a step): r = z, g = step (exp z - 1) / z. bilinear: exp r = (1 + z/2) / (1 - z/2),
    g = step / (1 - z/2).
    """
    z = step * eigenvalues
    if rule == "zoh":
        return z, jnp.expm1(z) / eigenvalues
    return jnp.log1p(z / 2) - jnp.log1p(-z / 2), step / (1 - z / 2)


def geometric_sum(
    coefficient: Inexact[Array, "D N"], log_ratio: Inexact[Array, "D N"], length: int
) -> Float[Array, "T D"]:
    """k_t = Re sum_n c_n exp(t r_n), t = 0 ... T - 1: the product with a Vandermonde matrix, O(T D N).

    With t = i C + j, C about sqrt(T), it is a matrix product of c_n exp(i C r_n) and exp(j r_n): the [D N T] array of
    all powers is never made, and 2 D N sqrt(T) exponentials serve instead of D N T.
    """
    columns = max(1, math.isqrt(max(length - 1, 0)) + 1)
    rows = -(-length // columns)
    i, j = jnp.arange(rows) * columns, jnp.arange(columns)
    left = coefficient[:, None] * jnp.exp(i[:, None] * log_ratio[:, None])  # [D rows N]
    right = jnp.exp(j[:, None] * log_ratio[:, None])  # [D columns N]
    if jnp.iscomplexobj(left):
        left = jnp.concatenate([left.real, -left.imag], -1)
        right = jnp.concatenate([right.real, right.imag], -1)
    k = jnp.einsum("din,djn->ijd", left, right, precision="highest")
    return k.reshape(rows * columns, k.shape[-1])[:length]


def two_sided_conv(
    x: Float[Array, "B T D"], ahead: Float[Array, "T D"], back: Float[Array, "S D"]
) -> Float[Array, "B T D"]:
    """y_t = sum_{s <= t} ahead_{t-s} x_s + sum_{s > t} back_{s-t-1} x_s; back has T - 1 taps. One transform of x."""
    return long_conv_nd(x, jnp.concatenate([back[::-1], ahead]), (-back.shape[0],))


def diagonal_ssm(
    x: Float[Array, "B T D"],
    log_ratio: Complex[Array, " N"],
    into: Complex[Array, "N D"],
    out: tuple[Complex[Array, "D N"], ...],
    *,
    keep: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T D"]:
    """Re C h_t with h_t = exp(r) h_{t-1} + B x_t, plus with a second C the same from the last token to the first.

    A token counts in both directions. Padding and other segments read as zeros. float32; O(T N D).
    """
    x = x.astype(jnp.float32)
    if keep is not None:
        x = jnp.where(keep[..., None], x, 0)
    u, ratio, total = complex_product(x, into), jnp.exp(log_ratio), jnp.zeros_like(x)
    for matrix, reverse in zip(out, (False, True)):
        reset = None if segment_ids is None else starts(segment_ids, reverse)
        h, _ = linear_recurrence(ratio, u, reset=reset, reverse=reverse, implementation=implementation)
        total += real_product(h, matrix)
    return total


def starts(segment_ids: Int[Array, "B T"], reverse: bool) -> Bool[Array, "B T"]:
    """Where a segment begins for who reads the row forwards, or backwards."""
    return first_tokens(segment_ids[:, ::-1])[:, ::-1] if reverse else first_tokens(segment_ids)


def complex_product(x: Float[Array, "*B D"], matrix: Complex[Array, "N D"]) -> Complex[Array, "*B N"]:
    """matrix x for real x, as two real products."""
    with exact(x):
        return jax.lax.complex(x @ matrix.real.T, x @ matrix.imag.T)


def real_product(h: Complex[Array, "*B N"], matrix: Complex[Array, "D N"]) -> Float[Array, "*B D"]:
    """Re(matrix h), as two real products."""
    with exact(h):
        return h.real @ matrix.real.T - h.imag @ matrix.imag.T


def as_complex(pair: Float[Array, "2 *n"]) -> Complex[Array, "*n"]:
    """Real and imaginary parts, as a parameter holds them, to complex64."""
    pair = pair.astype(jnp.float32)
    return jax.lax.complex(pair[0], pair[1])
