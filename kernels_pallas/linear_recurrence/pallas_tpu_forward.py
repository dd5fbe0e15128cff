"""TPU kernel, forward: time in order in VMEM, eight tokens at once in registers; README.md has the derivation.

Grid: (batch, tiles of channels, tiles of time), time last and in order. The state is carried in VMEM. The inputs are
read once and h is written once; a time-invariant a stays [D].
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import costs, mosaic_tpu
from kernels_pallas.linear_recurrence.pallas_tpu_rows import (
    GROUP,
    ROWS,
    one_if,
    plus,
    products,
    scanned,
    spread,
    times,
    zero_if,
)

SEMANTICS: tuple[Literal["parallel", "arbitrary"], ...] = ("parallel", "parallel", "arbitrary")


class Plan(NamedTuple):
    """What is fixed when a call is traced. tokens, channels: of a tile."""

    reverse: bool
    tokens: int
    channels: int
    interpret: mosaic_tpu.Interpret


def blocks(b: jax.Array, plan: Plan, *, backwards: bool) -> tuple[tuple[int, int, int], dict[str, pl.BlockSpec]]:
    """The grid and the blocks of [B T D] ("rows"), [D] as [1 D] ("all") and [B D] as [B 1 D] ("state")."""
    batch, length, width = b.shape
    tokens, channels = plan.tokens, plan.channels
    count = pl.cdiv(length, tokens)
    last_first = plan.reverse != backwards

    def time(t):
        return count - 1 - t if last_first else t

    specs = {
        "rows": pl.BlockSpec((1, tokens, channels), lambda n, d, t: (n, time(t), d)),
        "all": pl.BlockSpec((1, channels), lambda n, d, t: (0, d)),
        "state": pl.BlockSpec((1, 1, channels), lambda n, d, t: (n, 0, d)),
    }
    return (batch, pl.cdiv(width, channels), count), specs


@functools.partial(jax.jit, static_argnames=("plan",))
def forward(a, b, state, plan):
    planes, (batch, length, width) = len(b), b[0].shape
    grid, specs = blocks(b[0], plan, backwards=False)
    constant = a[0].ndim == 1
    out = mosaic_tpu.call(
        functools.partial(_forward_kernel, plan, planes, constant, length, grid[2]),
        name="linear_recurrence_forward",
        grid=grid,
        in_specs=[specs[name] for name in ("all" if constant else "rows", "rows", "state") for _ in range(planes)],
        out_specs=[specs["rows"]] * planes + [specs["state"]] * planes,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in b]
        + [jax.ShapeDtypeStruct((batch, 1, width), jnp.float32)] * planes,
        scratch_shapes=[pltpu.VMEM((ROWS, plan.channels), jnp.float32)] * planes,
        semantics=SEMANTICS,
        cost=cost(a, b, backward=False),
        interpret=plan.interpret,
        dtypes=[x.dtype for x in (*a, *b, *state)],
    )(*((x[None] for x in a) if constant else a), *b, *(x[:, None] for x in state))
    return tuple(out[:planes]), tuple(x[:, 0] for x in out[planes:])


def cost(a, b, *, backward: bool) -> pl.CostEstimate:
    """A time-invariant a, and da, is not moved once a token."""
    each = costs.linear_recurrence(
        b[0].size, b[0].size // b[0].shape[1], itemsize=4, is_complex=len(b) == 2, backward=backward
    )
    moved = costs.nbytes(*a, *b) * (2 if backward else 1) + costs.nbytes(*b)
    return dataclasses.replace(each, bytes=moved).estimate()


def _forward_kernel(plan, planes, constant, length, count, *refs):
    a_refs, b_refs, state_refs, h_refs, last_refs, carry_refs = (refs[n * planes : (n + 1) * planes] for n in range(6))
    step = pl.program_id(2)
    ragged = length % plan.tokens != 0
    shape = (ROWS, plan.channels)

    @pl.when(step == 0)
    def _():
        for carry, state in zip(carry_refs, state_refs):
            carry[...] = jnp.broadcast_to(state[0].astype(jnp.float32), shape)

    left = length - (count - 1 - step if plan.reverse else step) * plan.tokens  # tokens from this tile's first on
    if constant:
        everywhere = tuple(jnp.broadcast_to(ref[...].astype(jnp.float32), shape) for ref in a_refs)
        steps = [] if ragged else products(everywhere, plan.reverse)

    def group(n, carry):
        start = pl.multiple_of((plan.tokens // GROUP - 1 - n if plan.reverse else n) * GROUP, GROUP)
        rows = pl.ds(start, GROUP)
        loaded_a = () if constant else tuple(ref[0, rows].astype(jnp.float32) for ref in a_refs)
        loaded_b = tuple(ref[0, rows].astype(jnp.float32) for ref in b_refs)
        halves: list[Any] = [None, None]
        for half in (1, 0) if plan.reverse else (0, 1):
            part = slice(half * ROWS, (half + 1) * ROWS)
            b = tuple(x[part] for x in loaded_b)
            a = everywhere if constant else tuple(x[part] for x in loaded_a)
            if ragged:
                behind = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + (start + half * ROWS) >= left
                a, b = one_if(behind, a), zero_if(behind, b)
            prefix = steps if constant and not ragged else products(a, plan.reverse)
            h = scanned(prefix, b, plan.reverse)
            end = 0 if plan.reverse else ROWS - 1
            halves[half] = plus(h, times(prefix[3], carry))
            carry = plus(spread(h, end), times(spread(prefix[3], end), carry))
        for n, ref in enumerate(h_refs):
            ref[0, rows] = jnp.concatenate([half[n] for half in halves], 0).astype(ref.dtype)
        return carry

    carry = jax.lax.fori_loop(0, plan.tokens // GROUP, group, tuple(ref[...] for ref in carry_refs))
    for ref, last, x in zip(carry_refs, last_refs, carry):
        ref[...] = x
        last[0] = x[:1]
