"""Long convolution: the public function, its checks and the choice of implementation."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import dispatch
from kernels_pallas.long_conv.direct import long_conv_direct
from kernels_pallas.long_conv.fft import long_conv_fft
from kernels_pallas.long_conv.pallas_tpu import long_conv_tpu
from kernels_pallas.long_conv.ref import long_conv_ref
from kernels_pallas.sharded import Axes

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "ref": long_conv_ref,
    "direct": long_conv_direct,
    "fft": long_conv_fft,
    "pallas_tpu": long_conv_tpu,
}
# in order of preference; direct refuses filters past the measured crossover, fft differs on a CPU
AUTO = {"tpu": ("direct", "pallas_tpu", "fft"), "cpu": ("direct", "fft"), "default": ("direct", "fft")}
AXES = Axes(("B.H", ".H"), "B.H")


def long_conv(
    x: Float[Array, "B T D"], filter: Float[Array, "S D"], *, implementation: str | None = None
) -> Float[Array, "B T D"]:
    """Causal convolution, a filter a channel: y_t = sum_{0 <= s <= t} filter_s x_{t-s}. O(T D log T).

    Source: Poli et al. 2023, arXiv:2302.10866, section 2.1; by Fourier transform since Cooley and Tukey 1965.

    Args:
      x: the sequence, any float dtype; before its first token it is 0.
      filter: S <= T taps, the first for the token itself; taps that would follow are 0.
      implementation: a key of IMPLEMENTATIONS; None takes the first in AUTO that does not refuse.

    Returns:
      y in the dtype of x. Sums run in float32 whatever the inputs.

    Raises:
      ValueError: shapes that do not fit. KeyError: unknown implementation.
      NotImplementedError: refused; the message gives the reason.
    """
    if filter.shape[0] > x.shape[1] or filter.shape[1] != x.shape[2]:
        raise ValueError(
            f"long_conv: filter {filter.shape} must be [S D] with S <= T, of x {x.shape}; cut it to T taps"
        )
    if 0 in x.shape or 0 in filter.shape:
        dispatch.check("long_conv", IMPLEMENTATIONS, implementation)
        return jnp.zeros_like(x)
    y = dispatch.call("long_conv", IMPLEMENTATIONS, implementation, AUTO, x, filter, axes=AXES)
    return y.astype(x.dtype)
