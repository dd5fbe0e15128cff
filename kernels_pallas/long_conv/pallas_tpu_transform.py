"""The kernels of the long convolution on TPU: a Fourier transform as two matrix products, there and back; README.md."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels_pallas import costs, mosaic_tpu


@functools.lru_cache
def tables(rows: int, columns: int) -> tuple[np.ndarray, ...]:
    """Of N1 x N2 points: exp(-2 pi i n1 k1 / N1) for n1 < N1/2 as [2 N1, N1/2], real above imaginary; its transpose;
    exp(-2 pi i n2 k1 / N) as [2 N1 N2]; exp(-2 pi i n2 k2 / N2) as [N2, 2 N2], real beside imaginary."""
    k1, n1 = np.arange(rows)[:, None], np.arange(rows // 2)[None]
    n2 = np.arange(columns)
    one = np.exp(-2j * np.pi * (n1 * k1 % rows) / rows)
    turn = np.exp(-2j * np.pi * (k1 * n2[None]) / (rows * columns))
    two = np.exp(-2j * np.pi * (n2[:, None] * n2[None] % columns) / columns)
    one = np.concatenate([one.real, one.imag], 0)
    found = one, one.T, np.stack([turn.real, turn.imag]), np.concatenate([two.real, two.imag], 1)
    return tuple(np.ascontiguousarray(x, np.float32) for x in found)


def forward(plan, x, spectrum, constants, length):
    """y as x [B D N1/2 N2], B even."""
    batch, width = x.shape[:2]
    pair, spectra, fixed = _specs(plan)
    cost = costs.long_conv_products(batch, length, width, factors=(plan.rows, plan.columns), itemsize=x.dtype.itemsize)
    return mosaic_tpu.call(
        functools.partial(_forward_kernel, plan=plan),
        name="long_conv_forward",
        grid=(width // plan.channels, batch // 2),
        in_specs=[pair, spectra, *fixed],
        out_specs=pair,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        semantics=("parallel", "parallel"),
        cost=cost.estimate(),
        interpret=plan.interpret,
        working=16 * plan.rows * plan.columns * 4,
        dtypes=[x.dtype],
    )(x, spectrum, *constants)


def backward(plan, x, dy, spectrum, constants, length):
    """dx as x, and sum over the batch of conj(X) dY as [2 D N1 N2], as the spectrum."""
    batch, width = x.shape[:2]
    pair, spectra, fixed = _specs(plan)
    size = {"factors": (plan.rows, plan.columns), "itemsize": x.dtype.itemsize}
    one = costs.long_conv_products(batch, length, width, **size)
    return mosaic_tpu.call(
        functools.partial(_backward_kernel, plan=plan),
        name="long_conv_backward",
        grid=(width // plan.channels, batch // 2),
        in_specs=[pair, pair, spectra, *fixed],
        out_specs=[pair, spectra],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(spectrum.shape, jnp.float32)],
        semantics=("parallel", "arbitrary"),
        cost=costs.Cost(1.5 * one.flops, 1.5 * one.bytes).estimate(),
        interpret=plan.interpret,
        working=16 * plan.rows * plan.columns * 4,
        dtypes=[x.dtype, dy.dtype],
    )(x, dy, spectrum, *constants)


def _specs(plan):
    """Of two rows of x, of the spectra, of the constants."""
    rows, columns, channels = plan.rows, plan.columns, plan.channels
    pair = pl.BlockSpec((2, channels, rows // 2, columns), lambda d, b: (b, d, 0, 0))
    spectra = pl.BlockSpec((2, channels, rows, columns), lambda d, b: (0, d, 0, 0))
    shapes = (2 * rows, rows // 2), (rows // 2, 2 * rows), (2, rows, columns), (columns, 2 * columns)
    return pair, spectra, [pl.BlockSpec(shape, functools.partial(_whole, len(shape))) for shape in shapes]


def _whole(axes, d, b):
    return (0,) * axes


def _dot(a, b):
    return jax.lax.dot_general(
        a, b, (((1,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def transform(real, imaginary, one, turn, two):
    """The transform of real + i imaginary [N1/2 N2], the other half being 0: its parts [N1 N2]."""
    rows, columns = turn.shape[1:]
    found = _dot(one[...], jnp.concatenate([real, imaginary], 1))  # [2 N1, 2 N2]
    a = found[:rows, :columns] - found[rows:, columns:]
    b = found[rows:, :columns] + found[:rows, columns:]
    a, b = turn[0] * a - turn[1] * b, turn[0] * b + turn[1] * a
    found = _dot(jnp.concatenate([a, b], 0), two[...])
    return found[:rows, :columns] - found[rows:, columns:], found[:rows, columns:] + found[rows:, :columns]


def inverse(a, b, back, turn, two):
    """The first half of the inverse transform of a + i b, times N: its parts [N1/2 N2]."""
    rows, columns = turn.shape[1:]
    found = _dot(jnp.concatenate([a, b], 0), two[...])
    a, b = found[:rows, :columns] + found[rows:, columns:], found[rows:, :columns] - found[:rows, columns:]
    a, b = turn[0] * a + turn[1] * b, turn[0] * b - turn[1] * a
    both = jnp.concatenate([jnp.concatenate([a, b], 1), jnp.concatenate([b, -a], 1)], 0)
    found = _dot(back[...], both)
    return found[:, :columns], found[:, columns:]


def _forward_kernel(x_ref, spectrum_ref, one, back, turn, two, y_ref, *, plan):
    def channel(c, carry):
        a, b = transform(x_ref[0, c].astype(jnp.float32), x_ref[1, c].astype(jnp.float32), one, turn, two)
        f, g = spectrum_ref[0, c], spectrum_ref[1, c]
        a, b = inverse(f * a - g * b, f * b + g * a, back, turn, two)
        y_ref[0, c], y_ref[1, c] = a.astype(y_ref.dtype), b.astype(y_ref.dtype)
        return carry

    jax.lax.fori_loop(0, plan.channels, channel, 0)


def _backward_kernel(x_ref, dy_ref, spectrum_ref, one, back, turn, two, dx_ref, products_ref, *, plan):
    @pl.when(pl.program_id(1) == 0)
    def _():
        products_ref[...] = jnp.zeros(products_ref.shape, jnp.float32)

    def channel(c, carry):
        x, dy = (
            transform(ref[0, c].astype(jnp.float32), ref[1, c].astype(jnp.float32), one, turn, two)
            for ref in (x_ref, dy_ref)
        )
        products_ref[0, c] += x[0] * dy[0] + x[1] * dy[1]
        products_ref[1, c] += x[0] * dy[1] - x[1] * dy[0]
        f, g = spectrum_ref[0, c], spectrum_ref[1, c]
        a, b = inverse(f * dy[0] + g * dy[1], f * dy[1] - g * dy[0], back, turn, two)
        dx_ref[0, c], dx_ref[1, c] = a.astype(dx_ref.dtype), b.astype(dx_ref.dtype)
        return carry

    jax.lax.fori_loop(0, plan.channels, channel, 0)
