"""Multi-dimensional damped exponential moving average. Source: Ma et al. 2023, arXiv:2209.10655, section 3.1."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from arch.ops.ssm import geometric_sum, starts, two_sided_conv
from kernels_pallas.linear_recurrence import linear_recurrence
from kernels_pallas.long_conv import long_conv
from kernels_pallas.precision import exact


def coefficients(
    alpha: Float[Array, "2 ..."], beta: Float[Array, "..."], gamma: Float[Array, "... N"]
) -> tuple[Float[Array, "... N"], Float[Array, "... N"], Float[Array, "... N"]]:
    """(log q, p beta, gamma / sqrt N) of the recurrence in `damped_ema`; alpha holds the logits of a and d.

    With a = sigmoid(alpha_0), d = sigmoid(alpha_1): p = a and q = 1 - a d.
    """
    alpha, beta, gamma = (value.astype(jnp.float32) for value in (alpha, beta, gamma))
    p, damping = jax.nn.sigmoid(alpha[0]), jax.nn.sigmoid(alpha[1])
    return jnp.log1p(-p * damping), p * beta, gamma * gamma.shape[-1] ** -0.5


def damped_ema(
    x: Float[Array, "B T D"],
    log_q: Float[Array, "R D N"],
    into: Float[Array, "R D N"],
    out: Float[Array, "R D N"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """y_t = sum_n out_n h_tn with h_t = q h_{t-1} + into x_t, N averages a channel; float32.

    R is 1, or 2 for both directions: the second runs from the last token to the first and leaves out x_t itself. As a
    convolution O(T D (N + log T)); with segment_ids as the recurrence, of which [B T D N] is held.
    """
    x, length = x.astype(jnp.float32), x.shape[1]
    if segment_ids is not None:
        return sum(
            (_by_recurrence(x, *each, segment_ids, bool(i)) for i, each in enumerate(zip(log_q, into, out))),
            start=jnp.zeros_like(x),
        )
    kernels = [geometric_sum(i * o, r, length) for r, i, o in zip(log_q, into, out)]
    return long_conv(x, kernels[0]) if len(kernels) == 1 else two_sided_conv(x, kernels[0], kernels[1][1:])


def _by_recurrence(x: Array, log_q: Array, into: Array, out: Array, segment_ids: Array, reverse: bool) -> Array:
    batch, length, width = x.shape
    fed = (x[..., None] * into).reshape(batch, length, -1)
    h, _ = linear_recurrence(jnp.exp(log_q).ravel(), fed, reset=starts(segment_ids, reverse), reverse=reverse)
    h = (h - fed if reverse else h).reshape(batch, length, width, -1)
    with exact(h):
        return jnp.einsum("btdn,dn->btd", h, out)
