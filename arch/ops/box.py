"""Sliding sums over grid axes."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def box_sum(x: Float[Array, "B *A D"], left: int, right: int) -> Float[Array, "B *A D"]:
    """y_t = sum of x_s, t - left <= s <= t + right, along every grid axis in turn; outside the grid x is 0.

    left + right + 1 shifted copies are added: for the small windows of pooling this beats a windowed reduction.
    """
    for axis in range(1, x.ndim - 1):
        size = x.shape[axis]
        padded = jnp.pad(x, [(left, right) if i == axis else (0, 0) for i in range(x.ndim)])
        copies = (_slice(padded, axis, start, size) for start in range(left + right + 1))
        x = sum(copies, start=jnp.zeros_like(x))
    return x


def _slice(x: Array, axis: int, start: int, size: int) -> Array:
    return x[tuple(slice(start, start + size) if i == axis else slice(None) for i in range(x.ndim))]
