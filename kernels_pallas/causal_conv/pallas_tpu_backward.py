"""The backward kernel of the short causal convolution on TPU: one pass from the last tile to the first; README.md."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import mosaic_tpu
from kernels_pallas.causal_conv import tiles
from kernels_pallas.causal_conv.pallas_tpu_forward import MOST, Plan, cost, earlier, masks, reached


def backward(plan: Plan, x, dy, table, halo, seen):
    """dx as x and dtable [16 D] float32 (the taps' rows, then the bias' in row 8).

    halo: the 8 tokens before the row [B 8 D] float32, or None. The tile before is read once more in its last 16 tokens.
    """
    steps, has_past, has_mask, has_before = plan.steps, halo is not None, seen is not None, plan.steps > 1
    per = plan.chunk // tiles.ROWS
    tile = pl.BlockSpec((1, plan.chunk, plan.width), lambda d, b, t: (b, steps - 1 - t, d))
    before = pl.BlockSpec(
        (1, tiles.ROWS, plan.width), lambda d, b, t: (b, jnp.maximum((steps - 1 - t) * per - 1, 0), d)
    )
    lanes, width = len(plan.lanes), min(plan.width, tiles.LANES)
    dx, sums = mosaic_tpu.call(
        functools.partial(_kernel, plan=plan, has_before=has_before, has_past=has_past, has_mask=has_mask),
        name="causal_conv_backward",
        grid=(pl.cdiv(x.shape[2], plan.width), x.shape[0], steps),
        in_specs=[
            tile,
            tile,
            pl.BlockSpec((tiles.ROWS, plan.width), lambda d, b, t: (0, d)),
            *([before] if has_before else []),
            *([pl.BlockSpec((1, MOST, plan.width), lambda d, b, t: (b, 0, d))] if has_past else []),
            *(
                [pl.BlockSpec((1, 1, 2 * MOST, plan.chunk), lambda d, b, t: (b, steps - 1 - t, 0, 0))]
                if has_mask
                else []
            ),
        ],
        out_specs=[tile, pl.BlockSpec((plan.taps + 1, 8, plan.width), lambda d, b, t: (0, 0, d))],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((plan.taps + 1, 8, x.shape[2]), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((lanes, MOST + plan.chunk, width), jnp.float32)] * 2,
        semantics=("parallel", "arbitrary", "arbitrary"),
        cost=cost(plan, x, backward=True),
        interpret=plan.interpret,
        dtypes=[x.dtype, dy.dtype],
    )(
        *(x, dy, table),
        *([x] if has_before else []),
        *([halo] if has_past else []),
        *([masks(plan, seen)] if has_mask else []),
    )
    sums = sums.sum(1)
    return dx, jnp.zeros_like(table).at[: plan.taps].set(sums[:-1]).at[MOST].set(sums[-1])


def _kernel(*refs, plan: Plan, has_before, has_past, has_mask):
    """sums_ref [W+1 8 D] adds up over all tiles of a channel; slope_ref[j]: dz of the tile, then of 8 tokens after."""
    x_ref, dy_ref, table_ref, *rest = refs
    before_ref = rest.pop(0) if has_before else None
    past_ref = rest.pop(0) if has_past else None
    columns = rest.pop(0)[0, 0].T if has_mask else None  # [C 16]
    dx_ref, sums_ref, row_ref, slope_ref = rest
    turn = pl.program_id(2)
    tile = plan.steps - 1 - turn

    @pl.when((turn == 0) & (pl.program_id(1) == 0))
    def _():
        sums_ref[...] = jnp.zeros(sums_ref.shape, jnp.float32)

    for j, lanes in enumerate(plan.lanes):
        size = lanes.stop - lanes.start
        zeros = jnp.zeros((MOST, size), jnp.float32)

        @pl.when(turn == 0)
        def _(j=j, zeros=zeros):
            slope_ref[j, plan.chunk :, :] = zeros

        @pl.when(turn > 0)
        def _(j=j):
            slope_ref[j, plan.chunk :, :] = slope_ref[j, :MOST, :]

        @pl.when(tile == 0)
        def _(j=j, lanes=lanes, zeros=zeros):
            row_ref[j, :MOST, :] = zeros if past_ref is None else past_ref[0, :, lanes]

        if before_ref is not None:

            @pl.when(tile > 0)
            def _(j=j, lanes=lanes):
                row_ref[j, :MOST, :] = before_ref[0, :, lanes].astype(jnp.float32)[tiles.ROWS - MOST :]

        def real(values, start, count):  # what lies past the end of the row may be anything
            if not plan.ragged:
                return values
            place = tile * plan.chunk + start + jax.lax.broadcasted_iota(jnp.int32, (count, 1), 0)
            return jnp.where(place < plan.length, values, 0.0)

        for start, count in plan.pieces:
            x = x_ref[0, pl.ds(start, count), lanes].astype(jnp.float32)
            row_ref[j, pl.ds(MOST + start, count), :] = real(x, start, count)
        sums = [zeros] * (plan.taps + 1)
        for start, count in reversed(plan.pieces):
            slope = dy_ref[0, pl.ds(start, count), lanes].astype(jnp.float32)
            if plan.silu:
                total = reached(plan, table_ref, row_ref, j, lanes, start, count, columns)
                half = 0.5 * total
                bend = jnp.tanh(half)  # of z sigmoid(z), z = 2 half: half (1 + bend)
                slope = 0.5 * slope * ((1.0 + bend) * (1.0 + half * (1.0 - bend)))
            slope = real(slope, start, count)
            slope_ref[j, pl.ds(start, count), :] = slope
            dx: Any = None
            for i in range(plan.taps):
                later = slope_ref[j, pl.ds(start + i, count), :]
                if columns is not None:
                    later = jnp.where(columns[start : start + count, MOST + i : MOST + i + 1] != 0, later, 0.0)
                term = table_ref[i : i + 1, lanes] * later
                dx = term if dx is None else dx + term
                sums[i] = sums[i] + _by_eights(slope * earlier(row_ref, j, i, start, count, columns))
            sums[-1] = sums[-1] + _by_eights(slope)
            dx_ref[0, pl.ds(start, count), lanes] = dx.astype(dx_ref.dtype)
        for i, total in enumerate(sums):
            sums_ref[i, :, lanes] += total


def _by_eights(x):
    """[n D] -> [8 D]: the sum of its groups of eight rows."""
    return x.reshape(-1, 8, x.shape[1]).sum(0)
