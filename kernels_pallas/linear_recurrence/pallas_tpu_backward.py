"""TPU kernel, backward: the adjoint recurrence, from the last token read to the first; README.md has the derivation.

Read are a, h and dh, written da and db, each once. Beside its own tile of h the kernel reads the 16 rows before it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import mosaic_tpu
from kernels_pallas.linear_recurrence.pallas_tpu_forward import SEMANTICS, blocks, cost
from kernels_pallas.linear_recurrence.pallas_tpu_rows import (
    GROUP,
    ROWS,
    conjugate,
    first,
    moved,
    one_if,
    plus,
    products,
    scanned,
    spread,
    times,
    zero_if,
)


@functools.partial(jax.jit, static_argnames=("plan",))
def backward(a, h, state, dh, dlast, plan):
    """(da, db, dstate), planes as in pallas_tpu.run."""
    planes, (batch, length, width) = len(h), h[0].shape
    grid, specs = blocks(h[0], plan, backwards=True)
    constant = a[0].ndim == 1
    per_tile, count = plan.tokens // GROUP, grid[2]
    most = pl.cdiv(length, GROUP) - 1

    def before(n, d, t):  # the 16 rows that were read before this tile
        tile = t if plan.reverse else count - 1 - t
        return n, jnp.minimum((tile + 1) * per_tile, most) if plan.reverse else jnp.maximum(tile * per_tile - 1, 0), d

    near = pl.BlockSpec((1, GROUP, plan.channels), before)
    kinds = {"a": specs["all" if constant else "rows"], "near": near}
    kinds |= {"h": specs["rows"], "dh": specs["rows"], "state": specs["state"], "dlast": specs["state"]}
    arrays = {"a": [x[None] for x in a] if constant else a, "near": h, "h": h, "dh": dh}
    arrays |= {"state": [x[:, None] for x in state], "dlast": [x[:, None] for x in dlast]}
    flat = [x for name in kinds for x in arrays[name]]
    small = jax.ShapeDtypeStruct((batch, 1, width), jnp.float32)
    shapes = [small if constant else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in a]
    out = mosaic_tpu.call(
        functools.partial(_backward_kernel, plan, planes, constant, length, count),
        name="linear_recurrence_backward",
        grid=grid,
        in_specs=[spec for spec in kinds.values() for _ in range(planes)],
        out_specs=[specs[name] for name in ("state" if constant else "rows", "rows", "state") for _ in range(planes)],
        out_shape=shapes + [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in h] + [small] * planes,
        scratch_shapes=[pltpu.VMEM((ROWS, plan.channels), jnp.float32)] * (2 * planes),
        semantics=SEMANTICS,
        cost=cost(a, h, backward=True),
        interpret=plan.interpret,
        dtypes=[x.dtype for x in flat],
    )(*flat)
    da, db, dstate = (tuple(out[n * planes : (n + 1) * planes]) for n in range(3))
    if constant:
        da = tuple(x.sum((0, 1)).astype(like.dtype) for x, like in zip(da, a))
    return da, db, tuple(x[:, 0] for x in dstate)


def _backward_kernel(plan, planes, constant, length, count, *refs):
    names = ("a", "near", "h", "dh", "state", "dlast", "da", "db", "dstate", "carry", "sum")
    ref = {name: refs[n * planes : (n + 1) * planes] for n, name in enumerate(names)}
    shape = (ROWS, plan.channels)
    step, groups = pl.program_id(2), plan.tokens // GROUP
    tile = step if plan.reverse else count - 1 - step
    ragged = length % plan.tokens != 0
    left = length - tile * plan.tokens
    ahead = not plan.reverse  # the adjoint is read from the last token to the first

    @pl.when(step == 0)
    def _():
        for carry, dlast, total in zip(ref["carry"], ref["dlast"], ref["sum"]):
            carry[...] = jnp.broadcast_to(dlast[0], shape)
            total[...] = jnp.zeros(shape, jnp.float32)

    def wide(x):
        return x.astype(jnp.float32)

    edge = 0 if plan.reverse else GROUP - 1  # of 16 rows, the last that was read

    def row(x):
        return jnp.broadcast_to(x[edge : edge + 1], shape)

    is_first = step == count - 1  # the tile that was read first: the state stands before it
    entry = tuple(
        jnp.where(is_first, jnp.broadcast_to(wide(state[0]), shape), row(wide(near[0])))
        for state, near in zip(ref["state"], ref["near"])
    )
    everywhere = tuple(jnp.broadcast_to(wide(r[...]), shape) for r in ref["a"]) if constant else ()

    def adjoint_steps(a):
        """The factors of the adjoint: conj a of the next token read; 1 for the last, whose next is in the carry."""
        a = conjugate(a)
        return products(one_if(first(shape, 1, ahead), moved(a, 1, ahead)), ahead), a

    def read_h(start):
        """16 rows of h; those behind the end hold the state, as it passes them."""
        h = tuple(wide(r[0, pl.ds(start, GROUP)]) for r in ref["h"])
        if not ragged:
            return h
        behind = jax.lax.broadcasted_iota(jnp.int32, h[0].shape, 0) + start >= left
        return tuple(jnp.where(behind, wide(state[0]), x) for state, x in zip(ref["state"], h))

    fixed = adjoint_steps(everywhere) if constant and not ragged else None

    def group(n, carried):
        carry, total = carried
        n = groups - 1 - n if ahead else n
        start = pl.multiple_of(n * GROUP, GROUP)
        rows = pl.ds(start, GROUP)
        loaded = {"h": read_h(start), "dh": tuple(wide(r[0, rows]) for r in ref["dh"])}
        if not constant:
            loaded["a"] = tuple(wide(r[0, rows]) for r in ref["a"])
        other = jnp.clip(n - 1 if ahead else n + 1, 0, groups - 1) * GROUP
        outermost = n == (0 if ahead else groups - 1)
        near = tuple(jnp.where(outermost, e, row(x)) for e, x in zip(entry, read_h(pl.multiple_of(other, GROUP))))
        da: list[Any] = [None, None]
        db: list[Any] = [None, None]
        for half in (1, 0) if ahead else (0, 1):
            part = slice(half * ROWS, (half + 1) * ROWS)
            h, dh = (tuple(x[part] for x in loaded[name]) for name in ("h", "dh"))
            a = everywhere if constant else tuple(x[part] for x in loaded["a"])
            if half == (0 if ahead else 1):
                entering = near
            else:
                inner = slice(0, ROWS) if ahead else slice(ROWS, GROUP)
                entering = spread(tuple(x[inner] for x in loaded["h"]), ROWS - 1 if ahead else 0)
            h_before = tuple(
                jnp.where(first(shape, 1, plan.reverse), e, x) for e, x in zip(entering, moved(h, 1, plan.reverse))
            )
            if ragged:
                behind = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + (start + half * ROWS) >= left
                a, dh, h_before = one_if(behind, a), zero_if(behind, dh), zero_if(behind, h_before)
            steps, a = fixed or adjoint_steps(a)
            local = scanned(steps, dh, ahead)
            gradient = plus(local, times(steps[3], carry))
            end = 0 if ahead else ROWS - 1
            passed = times(spread(a, end), spread(steps[3], end))
            carry = plus(times(spread(a, end), spread(local, end)), times(passed, carry))
            db[half], da[half] = gradient, times(gradient, conjugate(h_before))
            if constant:
                total = plus(total, da[half])
        for n in range(planes):
            ref["db"][n][0, rows] = jnp.concatenate([x[n] for x in db], 0).astype(ref["db"][n].dtype)
            if not constant:
                ref["da"][n][0, rows] = jnp.concatenate([x[n] for x in da], 0).astype(ref["da"][n].dtype)
        return carry, total

    start = tuple(r[...] for r in ref["carry"]), tuple(r[...] for r in ref["sum"])
    carry, total = jax.lax.fori_loop(0, groups, group, start)
    for n in range(planes):
        ref["carry"][n][...], ref["sum"][n][...] = carry[n], total[n]
        ref["dstate"][n][0] = carry[n][:1]
        if constant:
            ref["da"][n][0] = total[n].sum(0, keepdims=True)
