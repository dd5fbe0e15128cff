"""TPU kernel, forward: the time loop in VMEM, N states on sublanes, channels on lanes; README.md has the derivation.

Grid: (batch, tiles of channels, tiles of time), time last and in order. Read are u, delta, B and C, written is y, each
once; exp(delta A) exists in registers alone. For the backward pass the state before every tile of time is written too.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import costs, mosaic_tpu
from kernels_pallas.selective_scan import tiles

SEMANTICS: tuple[Literal["parallel", "arbitrary"], ...] = ("parallel", "parallel", "arbitrary")
ROWS = 8  # sublanes of a register of float32; tokens of a group
GROUP = 16  # rows of a register of bfloat16
LANES = tiles.LANES
LOG2E = 1.4426950408889634  # exp(x) = 2^(x log2 e); the factor is in A


class Plan(NamedTuple):
    """What is fixed when a call is traced. tokens, channels: of a tile."""

    tokens: int
    channels: int
    interpret: mosaic_tpu.Interpret


class Sizes(NamedTuple):
    """length, width: T and D. states: N filled up to whole registers. steps: tiles of time."""

    length: int
    width: int
    states: int
    steps: int
    reset: bool


def sizes(u, A, reset, plan) -> Sizes:
    _, length, width = u.shape
    return Sizes(length, width, -(-A.shape[1] // ROWS) * ROWS, pl.cdiv(length, plan.tokens), reset is not None)


def filled(x: jax.Array, *shape: int) -> jax.Array:
    """x with zeros behind its last two axes up to `shape`, in float32."""
    x = x.astype(jnp.float32)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, n - m) for n, m in zip(shape, x.shape[-2:])])


def states_first(x: jax.Array, size: Sizes, plan: Plan) -> jax.Array:
    """[... D N] -> [... N D], filled up to whole tiles."""
    return filled(x.swapaxes(-1, -2), size.states, -(-size.width // plan.channels) * plan.channels)


def tokens_last(B, C, reset, size: Sizes, plan: Plan) -> jax.Array:
    """B, C and what a reset leaves, [B, T / 128, 2 N (+ 8), 128]: a token is a lane, small beside u."""
    length = size.steps * plan.tokens
    parts = [filled(x.swapaxes(1, 2), size.states, length) for x in (B, C)]
    if reset is not None:
        parts.append(jnp.repeat(1 - filled(reset[:, None], 1, length), ROWS, 1))
    x = jnp.concatenate(parts, 1)
    return x.reshape(x.shape[0], -1, length // LANES, LANES).swapaxes(1, 2)


def blocks(size: Sizes, plan: Plan, *, backwards: bool) -> dict[str, pl.BlockSpec]:
    def time(t):
        return size.steps - 1 - t if backwards else t

    channels, lane_tiles = plan.channels, plan.tokens // LANES
    few = 2 * size.states
    return {
        "rows": pl.BlockSpec((1, plan.tokens, channels), lambda n, d, t: (n, time(t), d)),  # [B T D]
        "pairs": pl.BlockSpec((1, lane_tiles, few + ROWS * size.reset, LANES), lambda n, d, t: (n, time(t), 0, 0)),
        "A": pl.BlockSpec((size.states, channels), lambda n, d, t: (0, d)),  # [N D]
        "D": pl.BlockSpec((1, channels), lambda n, d, t: (0, d)),  # [1 D]
        "state": pl.BlockSpec((1, size.states, channels), lambda n, d, t: (n, 0, d)),  # [B N D]
        "row": pl.BlockSpec((1, 1, channels), lambda n, d, t: (n, 0, d)),  # [B 1 D]
        "entries": pl.BlockSpec((1, 1, size.states, channels), lambda n, d, t: (n, time(t), 0, d)),  # [B tiles N D]
        "dpairs": pl.BlockSpec((1, 1, lane_tiles, few, LANES), lambda n, d, t: (n, d, time(t), 0, 0)),
    }


@functools.partial(jax.jit, static_argnames=("plan", "save"))
def forward(u, delta, A, B, C, D, state, reset, plan, save):
    """y, the last state and, if save, the state before every tile of time [B, tiles, N, D], filled up."""
    size = sizes(u, A, reset, plan)
    spec = blocks(size, plan, backwards=False)
    pairs = tokens_last(B, C, reset, size, plan)
    rates, entry = states_first(A * LOG2E, size, plan), states_first(state, size, plan)
    arrays = (u, delta, pairs, rates, D[None], entry)
    batch, padded = u.shape[0], entry.shape[2]
    saved = [jax.ShapeDtypeStruct((batch, size.steps, size.states, padded), jnp.float32)] * save
    y, last, *entries = mosaic_tpu.call(
        functools.partial(_kernel, plan, size, save),
        name="selective_scan_forward",
        grid=(batch, padded // plan.channels, size.steps),
        in_specs=[spec[name] for name in ("rows", "rows", "pairs", "A", "D", "state")],
        out_specs=[spec[name] for name in ("rows", "state", "entries")[: 2 + save]],
        out_shape=[jax.ShapeDtypeStruct(u.shape, u.dtype), jax.ShapeDtypeStruct(entry.shape, jnp.float32), *saved],
        scratch_shapes=[
            pltpu.VMEM((size.states, plan.channels), jnp.float32),
            wide_rows(plan),
            wide_rows(plan),
            partial_sums(plan),
        ],
        semantics=SEMANTICS,
        cost=cost(u, B, backward=False),
        interpret=plan.interpret,
        vmem=tiles.VMEM,
        dtypes=[x.dtype for x in arrays],
    )(*arrays)
    return y, last[:, : A.shape[1], : size.width].swapaxes(1, 2), entries[0] if save else None


def cost(u, B, *, backward: bool) -> pl.CostEstimate:
    batch, length, width = u.shape
    each = costs.selective_scan(batch, length, width, B.shape[2], itemsize=u.dtype.itemsize, backward=backward)
    return each.estimate()


def wide_rows(plan: Plan) -> Any:
    """Scratch for a block of [T D] in float32: [lane tile x token, lane]."""
    return pltpu.VMEM((plan.channels // LANES * plan.tokens, LANES), jnp.float32)


def get_rows(ref, start, plan: Plan, *, spread: bool = False) -> jax.Array:
    """[8 W]: eight tokens or, if spread, one token on all sublanes."""
    parts = []
    for n in range(plan.channels // LANES):
        first = n * plan.tokens + start
        if spread:
            parts.append(jnp.broadcast_to(ref[pl.ds(first, 1)], (ROWS, LANES)))
        else:
            parts.append(ref[pl.ds(pl.multiple_of(first, ROWS), ROWS)])
    return jnp.concatenate(parts, 1)


def put_rows(ref, start, plan: Plan, x) -> None:
    for n in range(plan.channels // LANES):
        ref[pl.ds(pl.multiple_of(n * plan.tokens + start, ROWS), x.shape[0])] = x[:, n * LANES : (n + 1) * LANES]


def tall(x, size: Sizes):
    """[8 W], the same on all sublanes, to [N W]."""
    return jnp.concatenate([x] * (size.states // ROWS), 0)


def partial_sums(plan: Plan) -> Any:
    """Scratch for the sums over states of eight tokens: [lane tile x token x sublane, lane]."""
    return pltpu.VMEM((plan.channels // LANES * ROWS * ROWS, LANES), jnp.float32)


def put_sum(ref, token, x):
    """Leaves x [N W] of a token for `sums`, added up to one register a lane tile."""
    x = x.reshape(-1, ROWS, x.shape[1]).sum(0)
    for n in range(x.shape[1] // LANES):
        ref[pl.ds((n * ROWS + token) * ROWS, ROWS)] = x[:, n * LANES : (n + 1) * LANES]


def sums(ref):
    """[8 W]: the sums over sublanes of eight tokens, a token a row: a strided load brings one sublane of each."""
    tiles = []
    for n in range(ref.shape[0] // ROWS**2):
        parts = [ref[pl.ds(n * ROWS**2 + s, ROWS, stride=ROWS)] for s in range(ROWS)]
        while len(parts) > 1:
            parts = [x + y for x, y in zip(parts[::2], parts[1::2])]
        tiles.append(parts[0])
    return jnp.concatenate(tiles, 1)


def widen(source, target, tile, size: Sizes, plan: Plan):
    """A block of [B T D] to float32; zeros behind the last token and channel, where delta = 0 changes nothing."""
    ragged = size.length % plan.tokens != 0 or size.width % plan.channels != 0
    first = pl.program_id(1) * plan.channels

    @pl.loop(0, plan.tokens // GROUP)
    def _(n):
        start = pl.multiple_of(n * GROUP, GROUP)
        x = source[0, pl.ds(start, GROUP)].astype(jnp.float32)
        if ragged:
            row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) + (tile * plan.tokens + n * GROUP)
            lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) + first
            x = jnp.where((row < size.length) & (lane < size.width), x, 0.0)
        put_rows(target, start, plan, x)


def narrow(source, target, plan: Plan):
    @pl.loop(0, plan.tokens // GROUP)
    def _(n):
        start = pl.multiple_of(n * GROUP, GROUP)
        x = jnp.concatenate([get_rows(source, start + first, plan) for first in range(0, GROUP, ROWS)], 0)
        target[0, pl.ds(start, GROUP)] = x.astype(target.dtype)


def column(pairs, token: int, first: int, count: int, channels: int):
    """[count W]: what one token (a lane) has in rows first and on, on all lanes."""
    return jnp.broadcast_to(pairs[first : first + count, token : token + 1], (count, channels))


def extended(h, delta, v, pairs, token, rates, size: Sizes, channels: int):
    """The state after a token; delta and v = delta u are [8 W], the same on all sublanes."""
    a = decay(delta, pairs, token, rates, size, channels)
    return a * h + tall(v, size) * column(pairs, token, 0, size.states, channels)


def decay(delta, pairs, token, rates, size: Sizes, channels: int):
    a = jnp.exp2(tall(delta, size) * rates)
    if not size.reset:
        return a
    keep = column(pairs, token, 2 * size.states, ROWS, channels)  # 0 or 1, the same for all states
    return (a.reshape(-1, ROWS, channels) * keep).reshape(a.shape)


def _kernel(plan, size, save, u_ref, delta_ref, pairs_ref, A_ref, D_ref, state_ref, y_ref, last_ref, *rest):
    entries_ref, h_ref, u, delta, partial = rest if save else (None, *rest)
    step, channels = pl.program_id(2), plan.channels

    @pl.when(step == 0)
    def _():
        h_ref[...] = state_ref[0]

    if save:
        entries_ref[0, 0] = h_ref[...]
    widen(u_ref, u, step, size, plan)
    widen(delta_ref, delta, step, size, plan)

    @pl.loop(0, plan.tokens // LANES)
    def _(lane_tile):
        def group(n, carry):
            h, pairs = carry
            rates = A_ref[...]
            start = pl.multiple_of(lane_tile * LANES + n * ROWS, ROWS)
            for token in range(ROWS):
                step_size, u_t = (get_rows(x, start + token, plan, spread=True) for x in (delta, u))
                h = extended(h, step_size, step_size * u_t, pairs, token, rates, size, channels)
                put_sum(partial, token, h * column(pairs, token, size.states, size.states, channels))
            put_rows(u, start, plan, sums(partial) + D_ref[...] * get_rows(u, start, plan))
            return h, pltpu.roll(pairs, LANES - ROWS, 1)  # the next group's tokens to the first lanes

        h_ref[...], _ = jax.lax.fori_loop(0, LANES // ROWS, group, (h_ref[...], pairs_ref[0, lane_tile]))

    narrow(u, y_ref, plan)
    last_ref[0] = h_ref[...]
