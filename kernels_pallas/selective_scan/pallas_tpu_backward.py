"""TPU kernel, backward: a tile's states once more, then the adjoint from its last token to its first.

README.md has the derivation. The states of one tile of time live in VMEM only. Written are du and ddelta, and of dB and
dC one partial sum a tile of channels; dA and dD are summed over time in VMEM, over the batch outside.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import mosaic_tpu
from kernels_pallas.selective_scan import tiles
from kernels_pallas.selective_scan.pallas_tpu_forward import (
    LANES,
    LOG2E,
    ROWS,
    SEMANTICS,
    blocks,
    column,
    cost,
    decay,
    extended,
    get_rows,
    narrow,
    partial_sums,
    put_rows,
    put_sum,
    sizes,
    states_first,
    sums,
    tall,
    tokens_last,
    wide_rows,
    widen,
)


@functools.partial(jax.jit, static_argnames=("plan",))
def backward(u, delta, A, B, C, D, reset, entries, dy, dlast, plan):
    """(du, ddelta, dA, dB, dC, dD, dstate)."""
    size = sizes(u, A, reset, plan)
    spec = blocks(size, plan, backwards=True)
    pairs = tokens_last(B, C, reset, size, plan)
    rates, dlast = states_first(A * LOG2E, size, plan), states_first(dlast, size, plan)
    arrays = (u, delta, dy, pairs, rates, D[None], entries, dlast)
    batch, padded = u.shape[0], dlast.shape[2]
    summed = jax.ShapeDtypeStruct(dlast.shape, jnp.float32)
    partial = (batch, padded // plan.channels, pairs.shape[1], 2 * size.states, LANES)
    du, ddelta, dpairs, dA, dD, dstate = mosaic_tpu.call(
        functools.partial(_kernel, plan, size),
        name="selective_scan_backward",
        grid=(batch, padded // plan.channels, size.steps),
        in_specs=[spec[name] for name in ("rows", "rows", "rows", "pairs", "A", "D", "entries", "state")],
        out_specs=[spec[name] for name in ("rows", "rows", "dpairs", "state", "row", "state")],
        out_shape=[
            jax.ShapeDtypeStruct(u.shape, u.dtype),
            jax.ShapeDtypeStruct(u.shape, delta.dtype),
            jax.ShapeDtypeStruct(partial, jnp.float32),
            summed,
            jax.ShapeDtypeStruct((batch, 1, padded), jnp.float32),
            summed,
        ],
        scratch_shapes=[
            pltpu.VMEM((size.states, plan.channels), jnp.float32),
            pltpu.VMEM((plan.tokens + 1, size.states, plan.channels), jnp.float32),
            *[wide_rows(plan)] * 3,
            *[partial_sums(plan)] * 2,
            pltpu.VMEM((plan.tokens, 2 * size.states, LANES), jnp.float32),
        ],
        semantics=SEMANTICS,
        cost=cost(u, B, backward=True),
        interpret=plan.interpret,
        vmem=tiles.VMEM,
        dtypes=[x.dtype for x in arrays],
    )(*arrays)
    dpairs = dpairs.sum(1).swapaxes(1, 2).reshape(batch, 2, size.states, -1)  # over tiles of channels
    dB, dC = (dpairs[:, n, : A.shape[1], : size.length].swapaxes(1, 2).astype(x.dtype) for n, x in enumerate((B, C)))
    dA, dstate = (x[..., : A.shape[1], : size.width].swapaxes(-1, -2) for x in (dA.sum(0), dstate))
    return du, ddelta, dA.astype(A.dtype), dB, dC, dD[:, 0, : size.width].sum(0).astype(D.dtype), dstate


def _kernel(plan, size, *refs):
    u_ref, delta_ref, dy_ref, pairs_ref, A_ref, D_ref, entries_ref, dlast_ref, *rest = refs
    du_ref, ddelta_ref, dpairs_ref, dA_ref, dD_ref, dstate_ref, *rest = rest
    g_ref, before, u, delta, dy, rate_sums, input_sums, over_tiles = rest
    step, channels, states = pl.program_id(2), plan.channels, size.states
    tile = size.steps - 1 - step
    groups = LANES // ROWS

    @pl.when(step == 0)
    def _():
        g_ref[...] = dlast_ref[0]
        dA_ref[...] = jnp.zeros(dA_ref.shape, jnp.float32)
        dD_ref[...] = jnp.zeros(dD_ref.shape, jnp.float32)

    widen(u_ref, u, tile, size, plan)
    widen(delta_ref, delta, tile, size, plan)
    widen(dy_ref, dy, tile, size, plan)

    def forwards(lane_tile, h):
        def group(n, carry):
            h, pairs = carry
            start = pl.multiple_of(lane_tile * LANES + n * ROWS, ROWS)
            for token in range(ROWS):
                before[start + token] = h
                step_size, u_t = (get_rows(x, start + token, plan, spread=True) for x in (delta, u))
                h = extended(h, step_size, step_size * u_t, pairs, token, A_ref[...], size, channels)
            return h, pltpu.roll(pairs, LANES - ROWS, 1)

        return jax.lax.fori_loop(0, groups, group, (h, pairs_ref[0, lane_tile]))[0]

    before[plan.tokens] = jax.lax.fori_loop(0, plan.tokens // LANES, forwards, entries_ref[0, 0])
    lane = jax.lax.broadcasted_iota(jnp.int32, (2 * states, LANES), 1)

    def backwards(n, carry):
        lane_tile = plan.tokens // LANES - 1 - n

        def group(n, carry):
            g, dA, pairs = carry
            rates = A_ref[...]
            start = pl.multiple_of(lane_tile * LANES + (groups - 1 - n) * ROWS, ROWS)
            for token in reversed(range(ROWS)):
                here = start + token
                step_size, u_t, dy_t = (get_rows(x, here, plan, spread=True) for x in (delta, u, dy))
                v, dy_t = tall(step_size * u_t, size), tall(dy_t, size)
                g = g + dy_t * column(pairs, token, states, states, channels)
                over_tiles[here] = jnp.concatenate([_over_tiles(g * v), _over_tiles(before[here + 1] * dy_t)], 0)
                put_sum(input_sums, token, g * column(pairs, token, 0, states, channels))
                g = g * decay(step_size, pairs, token, rates, size, channels)
                rate = g * before[here]  # the gradient of delta_t A
                put_sum(rate_sums, token, rate * rates)
                dA = dA + rate * tall(step_size, size)
            through_input, through_rate = sums(input_sums), sums(rate_sums) * (1 / LOG2E)
            u_t, delta_t, dy_t = (get_rows(x, start, plan) for x in (u, delta, dy))
            dD_ref[0] += (dy_t * u_t).sum(0, keepdims=True)
            put_rows(u, start, plan, D_ref[...] * dy_t + delta_t * through_input)
            put_rows(delta, start, plan, u_t * through_input + through_rate)
            return g, dA, pltpu.roll(pairs, ROWS, 1)  # the next group's tokens to the first lanes

        def over_lanes(n, total):
            total = pltpu.roll(total, LANES - ROWS, 1)
            for token in range(ROWS):
                each = over_tiles[lane_tile * LANES + n * ROWS + token].sum(1, keepdims=True)
                total = jnp.where(lane == LANES - ROWS + token, each, total)
            return total

        pairs = pltpu.roll(pairs_ref[0, lane_tile], ROWS, 1)
        g, dA, _ = jax.lax.fori_loop(0, groups, group, (*carry, pairs))
        zeros = jnp.zeros((2 * states, LANES), jnp.float32)
        dpairs_ref[0, 0, lane_tile] = jax.lax.fori_loop(0, groups, over_lanes, zeros)
        return g, dA

    start = (g_ref[...], dA_ref[0])
    g_ref[...], dA_ref[0] = jax.lax.fori_loop(0, plan.tokens // LANES, backwards, start)
    dstate_ref[0] = g_ref[...]
    narrow(u, du_ref, plan)
    narrow(delta, ddelta_ref, plan)


def _over_tiles(x):
    """[N W] -> [N 128]."""
    total = x[:, :LANES]
    for n in range(1, x.shape[1] // LANES):
        total = total + x[:, n * LANES : (n + 1) * LANES]
    return total
