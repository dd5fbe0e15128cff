"""The forward kernel of the short causal convolution on TPU, and what the backward one shares with it; README.md."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import costs, mosaic_tpu
from kernels_pallas.causal_conv import tiles

MOST = 8  # taps: the rows of one float32 tile, which hold what comes from the tile before


class Plan(NamedTuple):
    """What a kernel is compiled for."""

    taps: int
    length: int  # T, before any filling up
    chunk: int  # tokens a grid step
    steps: int  # grid steps along T
    width: int  # channels a grid step
    silu: bool
    interpret: Any

    @property
    def ragged(self) -> bool:
        return self.length != self.chunk * self.steps

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """(first token, tokens) of what is worked on at a time."""
        return [(r, min(tiles.PIECE, self.chunk - r)) for r in range(0, self.chunk, tiles.PIECE)]

    @property
    def lanes(self) -> list[slice]:
        return [slice(d, min(d + tiles.LANES, self.width)) for d in range(0, self.width, tiles.LANES)]


def forward(plan: Plan, x, table, past, seen):
    """y as x. table [16 D] float32: the taps, the bias in row 8; past [B W-1 D] float32 or None; seen: of `visible`."""
    has_past, has_mask = past is not None, seen is not None
    arrays = [x, table, *([halo(past)] if has_past else []), *([masks(plan, seen)] if has_mask else [])]
    tile = pl.BlockSpec((1, plan.chunk, plan.width), lambda b, d, t: (b, t, d))
    return mosaic_tpu.call(
        functools.partial(_kernel, plan=plan, has_past=has_past, has_mask=has_mask),
        name="causal_conv_forward",
        grid=(x.shape[0], pl.cdiv(x.shape[2], plan.width), plan.steps),
        in_specs=[
            tile,
            pl.BlockSpec((tiles.ROWS, plan.width), lambda b, d, t: (0, d)),
            *([pl.BlockSpec((1, MOST, plan.width), lambda b, d, t: (b, 0, d))] if has_past else []),
            *([pl.BlockSpec((1, 1, 2 * MOST, plan.chunk), lambda b, d, t: (b, t, 0, 0))] if has_mask else []),
        ],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM((len(plan.lanes), MOST + plan.chunk, min(plan.width, tiles.LANES)), jnp.float32)],
        semantics=("parallel", "parallel", "arbitrary"),
        cost=cost(plan, x, backward=False),
        interpret=plan.interpret,
        dtypes=[x.dtype],
    )(*arrays)


def cost(plan: Plan, x, *, backward: bool) -> pl.CostEstimate:
    batch, _, width = x.shape
    size = {"B": batch, "T": plan.length, "D": width, "W": plan.taps, "itemsize": x.dtype.itemsize}
    return costs.causal_conv(**size, silu=plan.silu, backward=backward).estimate()


def halo(past):
    """[B W-1 D] -> [B 8 D], the newest token last."""
    return jnp.pad(past, [(0, 0), (MOST - past.shape[1], 0), (0, 0)])


def masks(plan: Plan, seen):
    """[B steps 16 C] float32: row i, whether token t reads t - i; row 8 + i, whether token t + i reads t."""
    read = [m.astype(jnp.float32) for m in seen]
    ahead = [jnp.pad(m[:, i:], [(0, 0), (0, min(i, m.shape[1]))]) for i, m in enumerate(read)]
    zero = [jnp.zeros_like(read[0])] * (MOST - plan.taps)
    rows = jnp.stack([*read, *zero, *ahead, *zero], axis=1)  # [B 16 T]
    rows = jnp.pad(rows, [(0, 0), (0, 0), (0, plan.chunk * plan.steps - rows.shape[2])])
    return rows.reshape(*rows.shape[:2], plan.steps, plan.chunk).swapaxes(1, 2)


def reached(plan: Plan, table_ref, row_ref, j, lanes, start, count, columns):
    """bias + sum_i filter_i x_{t-i} for `count` tokens; row_ref[j] holds 8 tokens before the tile, then the tile."""
    total = table_ref[MOST : MOST + 1, lanes] + jnp.zeros((count, 1), jnp.float32)
    for i in range(plan.taps):
        total = total + table_ref[i : i + 1, lanes] * earlier(row_ref, j, i, start, count, columns)
    return total


def earlier(row_ref, j, i, start, count, columns):
    """x_{t-i} for `count` tokens, 0 where it is not seen."""
    x = row_ref[j, pl.ds(MOST + start - i, count), :]
    return x if columns is None else jnp.where(columns[start : start + count, i : i + 1] != 0, x, 0.0)


def _kernel(*refs, plan: Plan, has_past, has_mask):
    x_ref, table_ref, *rest = refs
    past_ref = rest.pop(0) if has_past else None
    columns = rest.pop(0)[0, 0].T if has_mask else None  # [C 16]
    y_ref, row_ref = rest
    first = pl.program_id(2) == 0
    for j, lanes in enumerate(plan.lanes):

        @pl.when(first)
        def _(j=j, lanes=lanes):
            shape = (MOST, lanes.stop - lanes.start)
            row_ref[j, :MOST, :] = jnp.zeros(shape, jnp.float32) if past_ref is None else past_ref[0, :, lanes]

        @pl.when(jnp.logical_not(first))
        def _(j=j):
            row_ref[j, :MOST, :] = row_ref[j, plan.chunk :, :]

        for start, count in plan.pieces:
            row_ref[j, pl.ds(MOST + start, count), :] = x_ref[0, pl.ds(start, count), lanes].astype(jnp.float32)
            total = reached(plan, table_ref, row_ref, j, lanes, start, count, columns)
            if plan.silu:
                half = 0.5 * total
                total = half + half * jnp.tanh(half)
            y_ref[0, pl.ds(start, count), lanes] = total.astype(y_ref.dtype)
