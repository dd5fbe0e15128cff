"""Random features of FAVOR+. Source: Choromanski et al. 2021, arXiv:2009.14794, sections 2.3 and 2.4.

With w ~ N(0, I), E[exp(w.x - |x|^2/2) exp(w.y - |y|^2/2)] = exp(x.y): positive features whose products are, on average,
the softmax kernel. The rows w are drawn independently, or orthogonal to each other in blocks of K, which lowers the
variance.
"""

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from arch.ops.segments import first_tokens
from kernels_pallas.precision import exact

LOWEST = -1e30  # the running maximum before any token: finite, so that differences of it are


def _rows(square: Any, gaussian: Any, orthogonal: bool, scaling: int, xp: ModuleType) -> Any:
    """Rows [M K] from Gaussian numbers: blocks [M/K K K] that are made orthogonal, and [M K] that gives the lengths.

    A row of an orthogonal block is uniform on the sphere only once the signs of R's diagonal are taken out of Q
    (Mezzadri 2007, arXiv:math-ph/0609050); the released code leaves them in, which makes its estimate biased.
    """
    features, width = gaussian.shape
    if not orthogonal:
        return gaussian
    q, r = xp.linalg.qr(square)
    q = q * xp.where(xp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)[:, None, :]
    directions = q.swapaxes(-1, -2).reshape(-1, width)[:features]
    lengths = xp.linalg.norm(gaussian, axis=-1, keepdims=True) if scaling == 0 else xp.sqrt(xp.float32(width))
    return directions * lengths


@functools.cache
def fixed_rows(seed: int, features: int, width: int, orthogonal: bool, scaling: int) -> np.ndarray:
    """The rows [M K] of an integer seed, float32, the same at every call."""
    rng = np.random.default_rng(seed)
    square, gaussian = (rng.standard_normal((-(-features // width), width, width)), (features, width))
    rows = _rows(square, rng.standard_normal(gaussian), orthogonal, scaling, np).astype(np.float32)
    rows.flags.writeable = False
    return rows


def drawn_rows(key: Array, features: int, width: int, orthogonal: bool, scaling: int) -> Float[Array, "M K"]:
    """Fresh rows [M K] from a key. scaling 0: lengths of Gaussian rows; 1: all sqrt(K) (the regularised kernel)."""
    one, two = jax.random.split(key)
    square = jax.random.normal(one, (-(-features // width), width, width))
    return _rows(square, jax.random.normal(two, (features, width)), orthogonal, scaling, jnp)


def project(x: Float[Array, "B T H K"], rows: Float[Array, "M K"]) -> Float[Array, "B T H M"]:
    """w.x in float32."""
    with exact(x):
        return jnp.einsum("bthk,mk->bthm", x.astype(jnp.float32), jnp.asarray(rows))


def query_features(q: Float[Array, "B T H K"], rows: Float[Array, "M K"], eps: float) -> Float[Array, "B T H M"]:
    """exp(w.q - max_m w.q) + eps, q scaled by K^-1/4: a factor a query leaves the normalised attention as it is."""
    logs = project(q, rows) * q.shape[-1] ** -0.25
    return jnp.exp(logs - jax.lax.stop_gradient(logs.max(-1, keepdims=True))) + eps


def key_logs(k: Float[Array, "B T H K"], rows: Float[Array, "M K"]) -> Float[Array, "B T H M"]:
    """w.k - |k|^2 / 2, k scaled by K^-1/4: the logarithms of the key features."""
    k = k.astype(jnp.float32) * k.shape[-1] ** -0.25
    return project(k, rows) - jnp.square(k).sum(-1, keepdims=True) / 2


def running_max(
    x: Float[Array, "B T H"], first: Bool[Array, "B T"] | None = None, start: Float[Array, "B H"] | None = None
) -> Float[Array, "B T H"]:
    """max of x_s over s <= t, and of `start`; anew from every token where `first` is True. No gradient."""

    def join(a, b):
        return a[0] | b[0], jnp.where(b[0], b[1], jnp.maximum(a[1], b[1]))

    x = jax.lax.stop_gradient(x)
    begins = jnp.zeros(x.shape, bool) if first is None else jnp.broadcast_to(first[..., None], x.shape)
    _, highest = jax.lax.associative_scan(join, (begins, x), axis=1)
    return highest if start is None else jnp.maximum(highest, start[:, None])


def highest_of_segment(x: Float[Array, "B T H"], segment_ids: Int[Array, "B T"] | None) -> Float[Array, "B #T H"]:
    """max of x over the row, or over the segment that a token is of. No gradient."""
    if segment_ids is None:
        return jax.lax.stop_gradient(x.max(1, keepdims=True, initial=LOWEST))
    back = running_max(jnp.flip(x, 1), first_tokens(jnp.flip(segment_ids, 1)))
    return jnp.maximum(running_max(x, first_tokens(segment_ids)), jnp.flip(back, 1))
