"""Blocks of queries, each against one wide tile of the few key blocks it sees. README.md has the derivation."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.attention import tiles
from kernels_pallas.precision import exact_for

NEVER = -jnp.inf  # the score of a key that is not visible


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known when tracing. Hashable, so that a second eager call finds the first one compiled."""

    repeats: int  # R = H / G, query heads a key head
    units: tuple[int, int]  # (batch rows, key heads) a step of the outer loop
    blocks: int  # M query blocks, whole steps of them
    step: int  # query blocks a step of the inner loop
    rows: int  # queries a block
    columns: int  # keys a block
    slots: int  # key blocks a query block sees
    span: tuple[int, int]  # the keys [start, stop) that the key blocks cover; beyond those there are, closed ones
    band: tuple[int, int] | None  # (left, right): slot n of query block i is key block i + n
    table: tuple[tuple[int, ...], bytes] | None  # or else int32 [J M slots], J = 1 or G: the key block of each slot
    scale: float
    activation: str


def attention_band(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    keep: Bool[Array, "B S"] | None,
    q_segments: Int[Array, "B T"] | None,
    k_segments: Int[Array, "B S"] | None,
    *,
    window: tuple[int, int],
    scale: float,
    activation: str,
    looped: bool,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """y, lse of api.attention for a window closed on both sides: O(T (left + right) K) a head, memory linear in T."""
    (batch, queries, heads, _), (keys, groups) = q.shape, k.shape[1:3]
    left, right = window
    rows = tiles.band_rows(left + right)
    before, after = -(-left // rows), -(-right // rows)  # key blocks that stick out on either side
    slots = before + 1 + after
    units, step = tiles.choose_steps(batch, groups, -(-queries // rows), heads // groups * rows * slots * rows, looped)
    blocks = -(-queries // (rows * step)) * step
    start = keys - queries - before * rows  # the first key of query block 0's first slot, maybe before the first
    stop = start + (blocks + slots - 1) * rows
    plan = Plan(
        *(
            heads // groups,
            units,
            blocks,
            step,
            rows,
            rows,
            slots,
            (start, stop),
            window,
            None,
            float(scale),
            activation,
        ),
    )
    visible = jnp.ones((1, keys), bool) if keep is None else keep
    args = {"q": q, "k": k, "v": v, "closed": jnp.where(_cut(visible, start, stop), 0.0, NEVER)}
    if q_segments is not None and k_segments is not None:
        args |= {"q_segments": _cut(q_segments, 0, blocks * rows), "k_segments": _cut(k_segments, start, stop)}
    return _attend(plan, args)


def attention_table(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    keep: Bool[Array, "B S"] | None,
    q_segments: Int[Array, "B T"] | None,
    k_segments: Int[Array, "B S"] | None,
    *,
    block_mask: Bool[np.ndarray, "J M N"],
    scale: float,
    activation: str,
    looped: bool,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """y, lse of api.attention for a block mask: T times the largest number of blocks in a row, whatever the others'."""
    (batch, queries, heads, _), (keys, groups) = q.shape, k.shape[1:3]
    if len(block_mask) > 1 and groups < heads:  # masks differ among the query heads of one key head
        k, v, groups = k.repeat(heads // groups, 2), v.repeat(heads // groups, 2), heads
    table = _slots(block_mask)  # [J M slots]
    deep, wide = block_mask.shape[1:]
    rows, columns, slots = queries // deep, keys // wide, table.shape[-1]
    units, step = tiles.choose_steps(batch, groups, deep, heads // groups * rows * slots * columns, looped)
    blocks = -(-deep // step) * step
    table = np.pad(table, [(0, 0), (0, blocks - deep), (0, 0)], constant_values=wide)
    full = keys + columns  # one key block more, closed: where slots without a block point
    plan = Plan(
        *(heads // groups, units, blocks, step, rows, columns, slots, (0, full), None, (table.shape, table.tobytes())),
        *(float(scale), activation),
    )
    visible = jnp.ones((1, keys), bool) if keep is None else keep
    args = {"q": q, "k": k, "v": v, "closed": jnp.where(_cut(visible, 0, full), 0.0, NEVER)}
    if q_segments is not None and k_segments is not None:
        args |= {"q_segments": _cut(q_segments, 0, blocks * rows), "k_segments": _cut(k_segments, 0, full)}
    return _attend(plan, args)


def _slots(block_mask: Bool[np.ndarray, "J M N"]) -> Int[np.ndarray, "J M L"]:
    """The visible key blocks of each row in order, filled up with N to the length of the longest row."""
    wide = block_mask.shape[-1]
    longest = max(1, int(block_mask.sum(-1).max()))
    order = np.sort(np.where(block_mask, np.arange(wide), wide), -1)[..., :longest]
    return order.astype(np.int32)


def _cut(x, start, stop, value=0):
    """x[:, start:stop] with zeros (False, or another value) where that reaches beyond x."""
    inside = x[:, max(start, 0) : max(stop, 0)]
    front = min(max(-start, 0), stop - start)
    fill = [(0, 0), (front, stop - start - front - inside.shape[1])] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(inside, fill, constant_values=value)


def _unit(plan: Plan, args, b, g):
    """The arguments of one block of units, cut into blocks: queries [nb ng M R*rows *], keys [nb ng N columns *]."""
    nb, ng = plan.units

    def take(x, index, size, axis):
        return x if x.shape[axis] == 1 else jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)

    def queries(x, value=0.0):  # [B T H *]
        x = _cut(take(take(x, b, nb, 0), g, ng * plan.repeats, 2), 0, plan.blocks * plan.rows, value)
        x = x.reshape(nb, plan.blocks, plan.rows, ng, plan.repeats, *x.shape[3:])
        x = jnp.moveaxis(x, (3, 1, 4, 2), (1, 2, 3, 4))
        return x.reshape(nb, ng, plan.blocks, plan.repeats * plan.rows, *x.shape[5:])

    def keys(x):  # [B S G *]
        x = _cut(take(take(x, b, nb, 0), g, ng, 2), *plan.span)
        return jnp.moveaxis(x.reshape(nb, -1, plan.columns, ng, *x.shape[3:]), 3, 1)

    unit = {name: queries(args[name]) for name in ("q", "dy", "delta") if name in args}
    if "divisor" in args:
        unit["divisor"] = queries(args["divisor"], jnp.inf)  # no gradient from the rows it is filled up with
    unit |= {name: keys(args[name]) for name in ("k", "v")}
    closed = take(args["closed"], b, nb, 0)
    unit["closed"] = closed.reshape(closed.shape[0], 1, -1, plan.columns)
    if "q_segments" in args:
        segments = take(args["q_segments"], b, nb, 0).reshape(nb, 1, plan.blocks, 1, plan.rows)
        segments = jnp.broadcast_to(segments, (nb, 1, plan.blocks, plan.repeats, plan.rows))
        unit["q_segments"] = segments.reshape(nb, 1, plan.blocks, -1)
        unit["k_segments"] = take(args["k_segments"], b, nb, 0).reshape(nb, 1, -1, plan.columns)
    if plan.table is not None:
        table = np.frombuffer(plan.table[1], np.int32).reshape(plan.table[0])
        unit["table"] = take(jnp.asarray(table), g, ng, 0)
    return unit


def _over_units(plan: Plan, batch, groups, step, carry):
    """step(carry, b, g) for each block of units; a lone step is not a loop."""
    deep, wide = batch // plan.units[0], groups // plan.units[1]
    return _loop(deep * wide, lambda n, carry: step(carry, n // wide, n % wide), carry)


def _loop(count, step, carry):
    return step(0, carry) if count == 1 else jax.lax.fori_loop(0, count, step, carry)


def _part(plan: Plan, x, n):
    """The query blocks of step n."""
    return jax.lax.dynamic_slice_in_dim(x, n * plan.step, plan.step, 2)


def _collect(plan: Plan, unit, x, n):
    """The key blocks of step n's query blocks side by side: [nb ng N columns *] -> [nb ng step slots*columns *]."""
    if plan.band is not None:
        parts = [jax.lax.dynamic_slice_in_dim(x, n * plan.step + o, plan.step, 2) for o in range(plan.slots)]
        return jnp.concatenate(parts, 3)
    table = jax.lax.dynamic_slice_in_dim(unit["table"], n * plan.step, plan.step, 1)  # [J step slots]
    flat = table.reshape(len(table), -1)
    if len(flat) == 1:
        wide = x.at[:, :, flat[0]].get(mode="promise_in_bounds")
    else:
        if x.shape[1] == 1:  # the same for all heads until now
            x = jnp.broadcast_to(x, (x.shape[0], len(flat), *x.shape[2:]))
        wide = jax.vmap(lambda x, i: x.at[:, i].get(mode="promise_in_bounds"), (1, 0), 1)(x, flat)
    return wide.reshape(*wide.shape[:2], plan.step, plan.slots * plan.columns, *x.shape[4:])


def _spread(plan: Plan, unit, total, tile, n):
    """The transpose of _collect: adds the tiles of step n to the key blocks they came from."""
    if plan.band is not None:
        for o, part in enumerate(jnp.split(tile, plan.slots, 3)):
            old = jax.lax.dynamic_slice_in_dim(total, n * plan.step + o, plan.step, 2)
            total = jax.lax.dynamic_update_slice_in_dim(total, old + part, n * plan.step + o, 2)
        return total
    table = jax.lax.dynamic_slice_in_dim(unit["table"], n * plan.step, plan.step, 1)
    flat = table.reshape(len(table), -1)
    tile = tile.reshape(*tile.shape[:2], -1, *total.shape[3:])
    if len(flat) == 1:
        return total.at[:, :, flat[0]].add(tile, mode="promise_in_bounds")
    add = jax.vmap(lambda x, i, t: x.at[:, i].add(t, mode="promise_in_bounds"), (1, 0, 1), 1)
    return add(total, flat, tile)


def _scores(plan: Plan, unit, q, k, n, flip=False):
    """Scores of step n, float32 [nb ng step queries keys], -inf where a key is not visible; flip: [.. keys queries]."""
    across = (lambda x: x.swapaxes(-1, -2)) if flip else (lambda x: x)
    one, two = (k, q) if flip else (q, k)
    scores = jnp.einsum("bgmxk,bgmyk->bgmxy", one, two, preferred_element_type=jnp.float32)
    if q.dtype != jnp.float32:
        scores *= plan.scale  # float32 queries come scaled
    scores += across(_collect(plan, unit, unit["closed"], n)[..., None, :])
    if plan.band is not None:
        left, right = plan.band
        key = np.arange(plan.slots * plan.columns) - -(-left // plan.rows) * plan.rows
        offset = np.tile(key[None] - np.arange(plan.rows)[:, None], (plan.repeats, 1))
        scores += across(np.where((offset >= -left) & (offset <= right), 0.0, NEVER).astype(np.float32))
    if "q_segments" in unit:
        mine, theirs = _part(plan, unit["q_segments"], n), _collect(plan, unit, unit["k_segments"], n)
        scores = jnp.where(across(mine[..., :, None] == theirs[..., None, :]), scores, NEVER)
    return scores


def _put(x, tile, n):
    return jax.lax.dynamic_update_slice_in_dim(x, tile.astype(x.dtype), n * tile.shape[2], 2)


def _put_queries(plan: Plan, x, tile, b, g):
    """The inverse of _unit's queries: writes [nb ng M R*rows *] into [B T H *]."""
    nb, ng = plan.units
    tile = tile.reshape(nb, ng, plan.blocks, plan.repeats, plan.rows, *tile.shape[4:])
    tile = jnp.moveaxis(tile, (2, 4, 1, 3), (1, 2, 3, 4)).reshape(nb, -1, ng * plan.repeats, *tile.shape[5:])
    return _put_unit(x, tile[:, : x.shape[1]], b, g)


def _put_keys(plan: Plan, x, tile, b, g):
    nb, ng = plan.units
    tile = jnp.moveaxis(tile, 1, 3).reshape(nb, -1, ng, *tile.shape[4:])
    start = plan.span[0]
    return _put_unit(x, _cut(tile, -start, x.shape[1] - start), b, g)


def _put_unit(x, tile, b, g):
    starts = (b * tile.shape[0], 0, g * tile.shape[2]) + (0,) * (x.ndim - 3)
    return jax.lax.dynamic_update_slice(x, tile.astype(x.dtype), starts)


def _scaled(plan: Plan, q):
    return plan.scale * q if q.dtype == jnp.float32 else q


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
@exact_for(lambda plan, args: (args["q"], args["k"], args["v"]))
def _attend(plan: Plan, args):
    """Every query sees all its keys in one tile, so the softmax needs no running maximum."""
    v = args["v"]

    def step(unit, n, carry):
        y, lse = carry
        k_n, v_n = _collect(plan, unit, unit["k"], n), _collect(plan, unit, unit["v"], n)
        scores = _scores(plan, unit, _part(plan, unit["q"], n), k_n, n)
        if plan.activation == "softmax":
            highest = scores.max(-1, keepdims=True)
            finite = jnp.where(highest == NEVER, 0.0, highest)
            weights = jnp.exp(scores - finite)
            total = weights.sum(-1, keepdims=True)
            nonzero = jnp.where(total == 0, 1.0, total)
            lse = _put(lse, jnp.where(total == 0, NEVER, finite + jnp.log(nonzero))[..., 0], n)
        else:
            weights, nonzero = jax.nn.sigmoid(scores), jnp.ones(())
        y_n = jnp.einsum("bgmts,bgmsv->bgmtv", weights.astype(v.dtype), v_n, preferred_element_type=jnp.float32)
        return _put(y, y_n / nonzero, n), lse

    def unit_step(carry, b, g):
        unit = _unit(plan, args, b, g)
        unit["q"] = _scaled(plan, unit["q"])
        rows = unit["q"].shape[:-1]
        start = (jnp.zeros((*rows, v.shape[-1]), v.dtype), jnp.full(rows, NEVER))
        y, lse = _loop(plan.blocks // plan.step, functools.partial(step, unit), start)
        return _put_queries(plan, carry[0], y, b, g), _put_queries(plan, carry[1], lse, b, g)

    batch, length, heads, _ = args["q"].shape
    start = jnp.zeros((batch, length, heads, v.shape[-1]), v.dtype), jnp.zeros((batch, length, heads))
    return _over_units(plan, batch, v.shape[2], unit_step, start)


def _forward(plan: Plan, args):
    y, lse = _attend(plan, args)
    return (y, lse), (args, y, lse)


@functools.partial(jax.jit, static_argnums=0)
@exact_for(lambda plan, saved, _: (saved[0]["q"], saved[0]["k"], saved[0]["v"]))
def _backward(plan: Plan, saved, cotangents):
    """chunked._backward with one tile a block of queries; the keys' gradients are added up over the blocks."""
    args, y, lse = saved
    dy, dlse = cotangents
    softmax = plan.activation == "softmax"
    empty = lse == NEVER
    delta = (dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1) - jnp.where(empty, 0.0, dlse)
    args = args | {"dy": dy, "delta": delta, "divisor": jnp.where(empty, jnp.inf, lse)}

    def step(unit, n, grads):
        q_n, dy_n, delta_n, divisor_n = (_part(plan, unit[name], n) for name in ("q", "dy", "delta", "divisor"))
        k_n, v_n = _collect(plan, unit, unit["k"], n), _collect(plan, unit, unit["v"], n)
        scores = _scores(plan, unit, q_n, k_n, n, flip=True)
        dweights = jnp.einsum("bgmsv,bgmtv->bgmst", v_n, dy_n, preferred_element_type=jnp.float32)
        if softmax:
            weights = jnp.exp(scores - divisor_n[..., None, :])
            dscores = weights * (dweights - delta_n[..., None, :])
        else:
            weights = jax.nn.sigmoid(scores)
            dscores = weights * (1 - weights) * dweights

        def product(equation, a, b):
            return jnp.einsum(equation, a.astype(b.dtype), b, preferred_element_type=jnp.float32)

        return {
            "q": _put(grads["q"], product("bgmst,bgmsk->bgmtk", dscores, k_n), n),
            "k": _spread(plan, unit, grads["k"], product("bgmst,bgmtk->bgmsk", dscores, q_n), n),
            "v": _spread(plan, unit, grads["v"], product("bgmst,bgmtv->bgmsv", weights, dy_n), n),
        }

    def unit_step(total, b, g):
        unit = _unit(plan, args, b, g)
        unit["q"] = _scaled(plan, unit["q"])
        grads = {name: jnp.zeros(unit[name].shape) for name in ("q", "k", "v")}
        grads = _loop(plan.blocks // plan.step, functools.partial(step, unit), grads)
        grads["q"] *= plan.scale
        if args["q"].dtype != jnp.float32:  # else the scale came with q
            grads["k"] *= plan.scale
        put = {"q": _put_queries, "k": _put_keys, "v": _put_keys}
        return {name: put[name](plan, total[name], grads[name], b, g) for name in put}

    zeros = {name: jnp.zeros(args[name].shape, args[name].dtype) for name in ("q", "k", "v")}
    total = _over_units(plan, args["k"].shape[0], args["k"].shape[2], unit_step, zeros)
    return ({name: total.get(name) for name in saved[0]},)


_attend.defvjp(_forward, _backward)


def split_rows(block_mask: Bool[np.ndarray, "J M N"], queries: int, keys: int) -> Bool[np.ndarray, " M"] | None:
    """Which query blocks are worth a tile of their own; None if none are.

    A gathered row costs as much as the longest gathered row, any other row all keys. The cut that costs least is
    taken, if it saves a quarter of what the tiles of `chunked` would compute.
    """
    deep, wide = block_mask.shape[1:]
    if not (tiles.GATHERED[0] <= min(queries // deep, keys // wide) and queries // deep <= tiles.GATHERED[1]):
        return None
    counts = block_mask.sum(-1).max(0)
    costs = {int(n): int(n) * int((counts <= n).sum()) + wide * int((counts > n).sum()) for n in np.unique(counts)}
    best = min(costs, key=lambda n: costs[n])
    high, across = (max(1, math.ceil(tiles.SKIPPED * n / length)) for n, length in ((deep, queries), (wide, keys)))
    lines = np.add.reduceat(block_mask.any(0), np.arange(0, deep, high), 0)  # any block of a tile: the whole tile
    touched = np.add.reduceat(lines, np.arange(0, wide, across), 1) > 0
    sizes = [np.diff([*range(0, n, each), n]) for n, each in ((deep, high), (wide, across))]
    return counts <= best if costs[best] < 0.75 * (sizes[0] @ touched @ sizes[1]) else None
