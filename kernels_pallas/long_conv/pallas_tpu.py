"""Long convolution on TPU (Pallas Mosaic TPU): Fourier transforms as matrix products; README.md has the derivation."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import mosaic_tpu
from kernels_pallas.long_conv import tiles
from kernels_pallas.long_conv.pallas_tpu_transform import backward, forward, inverse, tables, transform


class Plan(NamedTuple):
    """What a kernel is compiled for."""

    rows: int  # N1
    columns: int  # N2
    channels: int  # a grid step
    interpret: Any


def long_conv_tpu(
    x: Float[Array, "B T D"],
    filter: Float[Array, "S D"],
    *,
    channels: int = tiles.CHANNELS,
    interpret: mosaic_tpu.Interpret | None = None,
) -> Float[Array, "B T D"]:
    """y (float32, but rounded to the dtype of x) of api.long_conv. Saved: x and the filter's spectrum.

    Args:
      channels: a grid step. interpret: as mosaic_tpu.call; None as the context says.

    Raises:
      NotImplementedError: float16, or more than 8192 tokens.
    """
    mosaic_tpu.refuse_float16("long_conv", x)
    if x.shape[1] > tiles.LONGEST:
        raise NotImplementedError(
            f"long_conv: {x.shape[1]} tokens; two matrix products transform at most {tiles.LONGEST}, use fft"
        )
    mode = mosaic_tpu.interpreted() if interpret is None else interpret
    return _arranged(Plan(*tiles.factors(x.shape[1]), channels, mode), x, filter).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _arranged(plan: Plan, x, filter):
    batch, _, width = x.shape
    more = -width % plan.channels
    x = jnp.pad(x, [(0, batch % 2), (0, 0), (0, more)])
    y = _convolve(plan, filter.shape[0], x, jnp.pad(filter.astype(jnp.float32), [(0, 0), (0, more)]))
    return y[:batch, :, :width]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolve(plan: Plan, taps, x, filter):
    return _save(plan, taps, x, filter)[0]


def _save(plan: Plan, taps, x, filter):
    spectrum = _spectrum(plan, filter)
    y = forward(plan, _grids(plan, x), spectrum, tables(plan.rows, plan.columns), x.shape[1])
    return _ungrids(y, x), (x, spectrum)


def _backward(plan: Plan, taps, saved, dy):
    x, spectrum = saved
    dx, products = backward(
        plan, _grids(plan, x), _grids(plan, dy), spectrum, tables(plan.rows, plan.columns), x.shape[1]
    )
    _, back, turn, two = tables(plan.rows, plan.columns)
    dfilter, _ = jax.vmap(lambda a, b: inverse(a, b, back, turn, two))(*products)
    dfilter = dfilter.reshape(x.shape[2], -1)[:, :taps] / (plan.rows * plan.columns)
    return _ungrids(dx, x), dfilter.T


_convolve.defvjp(_save, _backward)


def _spectrum(plan: Plan, filter):
    """[2 D N1 N2]: real and imaginary parts of the filter's transform over N, point k1 + N1 k2 at [k1, k2]."""
    one, _, turn, two = tables(plan.rows, plan.columns)
    grids = _grids(plan, filter[None])[0]
    parts = jax.vmap(lambda x: transform(x, jnp.zeros_like(x), one, turn, two))(grids)
    return jnp.stack(parts) / (plan.rows * plan.columns)


def _grids(plan: Plan, x):
    """[B T D] -> [B D N1/2 N2]: token n1 N2 + n2 at [n1, n2], zeros behind the last one."""
    batch, length, width = x.shape
    x = jnp.pad(x, [(0, 0), (0, plan.rows * plan.columns // 2 - length), (0, 0)])
    return x.swapaxes(1, 2).reshape(batch, width, plan.rows // 2, plan.columns)


def _ungrids(y, like):
    return y.reshape(*y.shape[:2], -1)[:, :, : like.shape[1]].swapaxes(1, 2)
