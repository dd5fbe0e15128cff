"""Long convolution on TPU (Pallas Mosaic TPU): Fourier transforms as matrix products; README.md has the derivation."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import mosaic_tpu
from kernels_pallas.long_conv import tiles
from kernels_pallas.long_conv.pallas_tpu_kernels import backward, forward


class Plan(NamedTuple):
    """What a kernel is compiled for."""

    rows: int  # N1
    parts: int  # bfloat16 numbers that a factor of a product is split into
    at_once: int  # products a turn of a loop
    single: bool  # one buffer for each row instead of two: what VMEM holds
    interpret: Any


def long_conv_tpu(
    x: Float[Array, "B T D"],
    filter: Float[Array, "S D"],
    *,
    at_once: int | None = None,
    interpret: mosaic_tpu.Interpret | None = None,
) -> Float[Array, "B T D"]:
    """y (float32, but rounded to the dtype of x) of api.long_conv. Saved: the inputs.

    Args:
      at_once: independent products a turn of a loop: 1, 2, 4 or 8; None as tiles.py says.
      interpret: as mosaic_tpu.call; None as the context says.

    Raises:
      NotImplementedError: float16, or more than 8192 tokens.
    """
    mosaic_tpu.refuse_float16("long_conv", x, filter)
    if x.shape[1] > tiles.LONGEST:
        raise NotImplementedError(
            f"long_conv: {x.shape[1]} tokens; two matrix products transform at most {tiles.LONGEST}, use fft"
        )
    mode = mosaic_tpu.interpreted() if interpret is None else interpret
    wide = x.dtype == jnp.float32 and x.shape[1] > tiles.LONGEST // 2
    plan = Plan(tiles.rows(x.shape[1]), tiles.SPLIT[x.dtype.name], at_once or tiles.AT_ONCE, wide, mode)
    return _arranged(plan, x, filter).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _arranged(plan: Plan, x, filter):
    """Fewer channels than lanes are filled up; with more, the last block is cut by the kernel."""
    width = x.shape[2]
    more = max(0, tiles.LANES - width)
    if more:
        x, filter = jnp.pad(x, [(0, 0), (0, 0), (0, more)]), jnp.pad(filter, [(0, 0), (0, more)])
    return _convolve(plan, x, filter)[:, :, :width]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(plan: Plan, x, filter):
    return forward(plan, x, filter)


def _save(plan: Plan, x, filter):
    return _convolve(plan, x, filter), (x, filter)


def _backward(plan: Plan, saved, dy):
    x, filter = saved
    return backward(plan, x, dy, filter)


_convolve.defvjp(_save, _backward)
