"""The kernels of the long convolution on TPU, forward and backward; README.md."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import costs, mosaic_tpu
from kernels_pallas.long_conv import pallas_tpu_transform as fourier
from kernels_pallas.long_conv.tiles import COLUMNS, GROUP, LANES, PITCH


def forward(plan, x, filter):
    """y as x [B T D]."""
    batch, length, width = x.shape
    row, taps, fixed = _specs(plan, length, filter.shape[0])
    return _call(
        plan,
        functools.partial(_forward_kernel, plan=plan),
        name="long_conv_forward",
        grid=(pl.cdiv(width, LANES), batch),
        in_specs=[row, taps, *fixed],
        out_specs=row,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=_scratch(plan, 4),
        cost=costs.long_conv_products(
            batch, length, width, factors=(plan.rows, COLUMNS), parts=plan.parts, itemsize=x.dtype.itemsize
        ).estimate(),
        arrays=(x, filter),
    )


def backward(plan, x, dy, filter):
    """dx as x, dfilter as the filter [S D]."""
    batch, length, width = x.shape
    row, taps, fixed = _specs(plan, length, filter.shape[0])
    return _call(
        plan,
        functools.partial(_backward_kernel, plan=plan, batch=batch),
        name="long_conv_backward",
        grid=(pl.cdiv(width, LANES), batch),
        in_specs=[row, row, taps, *fixed],
        out_specs=[row, taps],
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, filter)],
        scratch_shapes=_scratch(plan, 8),
        cost=costs.long_conv_products(
            batch,
            length,
            width,
            factors=(plan.rows, COLUMNS),
            parts=plan.parts,
            itemsize=x.dtype.itemsize,
            backward=True,
        ).estimate(),
        arrays=(x, dy, filter),
    )


def _call(plan, kernel, *, arrays, **options):
    tables = fourier.tables(plan.rows, plan.parts)
    return mosaic_tpu.call(
        kernel,
        semantics=("parallel", "arbitrary"),
        interpret=plan.interpret,
        vmem=mosaic_tpu.MOST,
        working=2 << 20,
        dtypes=[a.dtype for a in (*arrays, *tables)],
        **options,
    )(*arrays, *tables)


def _specs(plan, length, taps):
    """Of a row of x, of the filter, of the tables."""
    single = {"pipeline_mode": pl.Buffered(1)}
    row = pl.BlockSpec((1, length, LANES), lambda d, b: (b, 0, d), **(single if plan.single else {}))
    filter = pl.BlockSpec((taps, LANES), lambda d, b: (0, d), **single)
    shapes = [table.shape for table in fourier.tables(plan.rows, plan.parts)]
    return row, filter, [pl.BlockSpec(s, functools.partial(_whole, len(s)), **single) for s in shapes]


def _whole(axes, d, b):
    return (0,) * axes


def _scratch(plan, planes):
    plane = pltpu.VMEM((plan.rows * PITCH, LANES), jnp.float32)
    return [plane] * planes + [pltpu.VMEM((GROUP, 2 * plan.rows, LANES), jnp.float32)]


def _spectrum(ref, planes, one, two, turns, plan):
    """The filter's transform, into planes."""
    fourier.load(lambda at: ref[at], ref.shape[0], planes[0], plan.rows)
    fourier.first(planes, one, turns, plan, exact=ref.dtype == jnp.bfloat16)
    fourier.by_rows(plan, lambda at: fourier.second(planes, at, two, plan), [planes])


def _transform_rows(ref, planes, one, turns, plan):
    fourier.load(lambda at: ref[0, at], ref.shape[1], planes[0], plan.rows)
    fourier.first(planes, one, turns, plan, exact=ref.dtype == jnp.bfloat16)


def _write_row(ref, plane):
    def write(at, x):
        ref[0, at] = x.astype(ref.dtype)

    fourier.store(plane, ref.shape[1], write)


def _forward_kernel(x, filter, one, back, two, owt, turn, y, real, imaginary, f, g, turns, *, plan):
    @pl.when(pl.program_id(1) == 0)
    def _():
        fourier.spread(turn[...], turns, plan.rows)
        _spectrum(filter, (f, g), one, two, turns, plan)

    planes = real, imaginary
    _transform_rows(x, planes, one, turns, plan)

    def multiply(at):
        a, b = fourier.halves(fourier.second(planes, at, two, plan))
        u, v = fourier.get((f, g), at)
        return jnp.concatenate([u * a - v * b, u * b + v * a], 0)

    fourier.by_rows(plan, multiply, [planes], owt)
    fourier.last(planes, back, turns, plan)
    _write_row(y, real)


def _backward_kernel(x, dy, filter, one, back, two, owt, turn, dx, dfilter, *scratch, plan, batch):
    planes, cotangent, spectrum, total = (scratch[n : n + 2] for n in range(0, 8, 2))
    turns = scratch[8]

    @pl.when(pl.program_id(1) == 0)
    def _():
        fourier.spread(turn[...], turns, plan.rows)
        _spectrum(filter, spectrum, one, two, turns, plan)
        for plane in total:
            fourier.clear(plane, 0, plan.rows)

    _transform_rows(x, planes, one, turns, plan)
    _transform_rows(dy, cotangent, one, turns, plan)

    def multiply(at):
        a, b = fourier.halves(fourier.second(planes, at, two, plan))
        c, d = fourier.halves(fourier.second(cotangent, at, two, plan))
        u, v = fourier.get(total, at)
        both = jnp.concatenate([u + a * c + b * d, v + a * d - b * c], 0)
        u, v = fourier.get(spectrum, at)
        return jnp.concatenate([u * c + v * d, u * d - v * c], 0), both

    fourier.by_rows(plan, multiply, [cotangent, total], owt)
    fourier.last(cotangent, back, turns, plan)
    _write_row(dx, cotangent[0])

    @pl.when(pl.program_id(1) == batch - 1)
    def _():
        def invert(at):
            return jnp.concatenate(fourier.get(total, at), 0)

        def write(at, x):
            dfilter[at] = x.astype(dfilter.dtype)

        fourier.by_rows(plan, invert, [total], owt)
        fourier.last(total, back, turns, plan)
        fourier.store(total[0], dfilter.shape[0], write)
