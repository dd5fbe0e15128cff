"""Tiles of queries against tiles of keys, with a running softmax; runs everywhere. README.md has the derivation.

Where each query sees few keys (a window, a block mask) `gathered` takes over.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.attention import tiles
from kernels_pallas.attention.gathered import attention_band, attention_table, split_rows
from kernels_pallas.precision import exact_for

NEVER = -jnp.inf  # the score of a key that is not visible


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known when tracing. Hashable, so that a second eager call finds the first one compiled."""

    queries: int  # T, before filling up to whole tiles
    keys: int  # S
    repeats: int  # R = H / G, query heads a key head
    units: tuple[int, int]  # (batch rows, key heads) a step of the outer loop
    rows: int  # queries a tile
    columns: int  # keys a tile
    inner: tuple[tuple[int, int], ...]  # tile pairs in which every query sees every key
    edge: tuple[tuple[int, int], ...]  # tile pairs that need a mask; the others are left out
    steps: int  # strips of rows that an edge tile is computed in, each as far right as its queries see
    window: tuple[int | None, int | None]
    blocks: tuple[tuple[int, ...], bytes] | None  # shape and contents of the block mask
    scale: float
    activation: str


def attention_chunked(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    bias: Float[Array, "#B #H #T #S"] | None,
    keep: Bool[Array, "B S"] | None,
    q_segments: Int[Array, "B T"] | None,
    k_segments: Int[Array, "B S"] | None,
    *,
    window: tuple[int | None, int | None],
    block_mask: Bool[np.ndarray, "J M N"] | None,
    scale: float,
    activation: str,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"] | None]:
    """y, lse of api.attention. The backward pass keeps the arguments, y and lse: memory linear in T and S."""
    given = (q, k, v, bias, keep, q_segments, k_segments)
    shared: dict[str, Any] = {"scale": scale, "activation": activation, "looped": dispatch.platform() == "cpu"}
    band, near = None, None
    if bias is None and block_mask is None:
        band = _band(k.shape[1], window)
    elif bias is None and block_mask is not None and window == (None, None):
        near = split_rows(block_mask, q.shape[1], k.shape[1])
    if band is not None:
        y, lse = attention_band(q, k, v, keep, q_segments, k_segments, window=band, **shared)
    elif near is not None:
        assert block_mask is not None
        y, lse = _by_rows(near, *given, block_mask=block_mask, **shared)
    else:
        y, lse = _by_pairs(*given, window=window, block_mask=block_mask, **shared)
    return y, (lse if activation == "softmax" else None)


def _band(keys, window):
    """The window if it is closed on both sides and narrow enough for attention_band to pay."""
    left, right = window
    if left is None or right is None:
        return None
    rows = tiles.band_rows(left + right)
    span = (-(-left // rows) + 1 + -(-right // rows)) * rows
    return (left, right) if 2 * span <= keys else None


def _by_rows(near, q, k, v, bias, keep, q_segments, k_segments, *, block_mask, **shared):
    """The blocks of queries that see few keys (`near`) gathered, the others by pairs of tiles."""

    def rows(x, chosen):
        return x.reshape(x.shape[0], len(near), -1, *x.shape[2:])[:, chosen].reshape(x.shape[0], -1, *x.shape[2:])

    def part(chosen):
        """q, q_segments and block_mask of the chosen blocks of queries."""
        return rows(q, chosen), None if q_segments is None else rows(q_segments, chosen), block_mask[:, chosen]

    if near.all():
        return attention_table(q, k, v, keep, q_segments, k_segments, block_mask=block_mask, **shared)
    mine, segments, mask = part(near)
    y, lse = attention_table(mine, k, v, keep, segments, k_segments, block_mask=mask, **shared)
    mine, segments, mask = part(~near)
    far = _by_pairs(mine, k, v, bias, keep, segments, k_segments, window=(None, None), block_mask=mask, **shared)
    size = q.shape[1] // len(near)
    place = np.argsort(np.concatenate([np.flatnonzero(near), np.flatnonzero(~near)]))
    place = (place[:, None] * size + np.arange(size)).ravel()
    return jnp.concatenate([y, far[0]], 1)[:, place], jnp.concatenate([lse, far[1]], 1)[:, place]


def _by_pairs(q, k, v, bias, keep, q_segments, k_segments, *, window, block_mask, scale, activation, looped):
    """Tiles of queries against tiles of keys with a running softmax, pair after pair."""
    (batch, queries, heads, _), (keys, groups) = q.shape, k.shape[1:3]
    skips = window != (None, None) or block_mask is not None
    units, rows, columns = tiles.choose(batch, groups, queries, keys, skips, looped)
    masked = q_segments is not None
    inner, edge = _visible_pairs(queries, keys, rows, columns, window, block_mask, masked)
    steps = _steps(queries, keys, rows, columns, window, edge) if looped else 1
    blocks = None if block_mask is None else (block_mask.shape, block_mask.tobytes())
    sizes = (queries, keys, heads // groups, units, rows, columns)
    plan = Plan(*sizes, inner, edge, steps, window, blocks, float(scale), activation)
    fill_q, fill_k = -queries % rows, -keys % columns
    if fill_k and keep is None:
        keep = jnp.ones((batch, keys), bool)
    args = {"q": q, "k": k, "v": v}
    if keep is not None:
        args["closed"] = jnp.where(_fill(keep, 1, fill_k), 0.0, NEVER)  # [B S], added to the scores
    if q_segments is not None and k_segments is not None:
        args |= {"q_segments": _fill(q_segments, 1, fill_q), "k_segments": _fill(k_segments, 1, fill_k)}
    if bias is not None:
        bias = _fill(_fill(bias, 2, fill_q), 3, fill_k)
        args["bias"] = bias.reshape(bias.shape[0], *_split_heads(bias.shape[1], plan), *bias.shape[2:])  # [B G R T S]
    return _attend(plan, args)


def _fill(x, axis, count, value=0):
    """Zeros (or another value) behind the last element; an axis of length 1 that broadcasts stays as it is."""
    if count == 0 or (x.shape[axis] == 1 and axis > 1):
        return x
    return jnp.pad(x, [(0, count if n == axis else 0) for n in range(x.ndim)], constant_values=value)


def _split_heads(heads, plan):
    return (1, 1) if heads == 1 else (heads // plan.repeats, plan.repeats)


def _visible_pairs(queries, keys, rows, columns, window, block_mask, masked):
    """Tile pairs (i, j) in which all pairs of tokens are visible, and those in which some are."""
    inner: list[tuple[int, int]] = []
    edge: list[tuple[int, int]] = []
    left, right = window
    for i, j in itertools.product(range(-(-queries // rows)), range(-(-keys // columns))):
        first, last = i * rows, min(queries, (i + 1) * rows) - 1
        start, stop = j * columns, min(keys, (j + 1) * columns) - 1
        low, high = start - (last + keys - queries), stop - (first + keys - queries)  # of s - position of t
        if (left is not None and high < -left) or (right is not None and low > right):
            continue
        whole = not masked and (left is None or low >= -left) and (right is None or high <= right)
        if block_mask is not None:
            deep, wide = queries // block_mask.shape[1], keys // block_mask.shape[2]
            part = block_mask[:, first // deep : last // deep + 1, start // wide : stop // wide + 1]
            if not part.any():
                continue
            whole = whole and bool(part.all())
        (inner if whole else edge).append((i, j))
    return tuple(inner), tuple(edge)


def _steps(queries, keys, rows, columns, window, edge):
    """The strips of rows of an edge tile such that, in each, strip n sees no further than its columns' strip n."""
    count = max(n for n in range(1, -(-rows // tiles.STRIP) + 1) if rows % n == 0 and columns % n == 0)
    if not edge or window[1] is None:
        return 1
    high, wide = rows // count, columns // count
    for (i, j), n in itertools.product(edge, range(1, count)):  # the first key that strip n - 1 leaves out
        if j * columns + n * wide <= i * rows + n * high - 1 + keys - queries + window[1]:
            return 1
    return count


def _take(x, start, size, axis):
    """x[start : start + size] along axis; all of x where that axis has length 1 and broadcasts."""
    return x if x.shape[axis] == 1 else jax.lax.dynamic_slice_in_dim(x, start, size, axis % x.ndim)


def _block(x, index, size, axis):
    return _take(x, index * size, size, axis)


def _put(x, tile, start, axis):
    return jax.lax.dynamic_update_slice_in_dim(x, tile.astype(x.dtype), start, axis % x.ndim)


def _put_heads(x, tile, size, b, g):
    """The inverse of _unit's: writes [units rows width] into [B T H width], without what it was filled up with."""
    length = x.shape[1]
    tile = tile.reshape(tile.shape[0], -1, length + -length % size, *tile.shape[3:]).swapaxes(1, 2)[:, :length]
    return (
        _put(x, tile, 0, 1)
        if tile.shape == x.shape
        else jax.lax.dynamic_update_slice(
            x, tile.astype(x.dtype), (b * tile.shape[0], 0, g * tile.shape[2]) + (0,) * (x.ndim - 3)
        )
    )


def _over_units(plan: Plan, batch, groups, step, carry):
    """step(carry, b, g) for each block of plan.units; a lone step is not a loop."""
    deep, wide = batch // plan.units[0], groups // plan.units[1]
    if deep * wide == 1:
        return step(carry, 0, 0)
    return jax.lax.fori_loop(0, deep * wide, lambda n, carry: step(carry, n // wide, n % wide), carry)


def _over_pairs(plan: Plan, step, carry):
    """step(carry, (head, first row, first column), (rows, columns), masked) for all visible pairs of tiles, one kind of
    step after the other: each is compiled once."""

    def inner(carry, pair):
        return step(carry, _places(plan, pair), (plan.rows, plan.columns), False)

    def edge(carry, pair):
        head, row, column = _places(plan, pair)
        high, wide = plan.rows // plan.steps, plan.columns // plan.steps
        for n in range(plan.steps):
            carry = step(carry, (head, row + n * high, column), (high, (n + 1) * wide), True)
        return carry

    for pairs, one in ((plan.inner, inner), (plan.edge, edge)):
        table = [(head, *pair) for head, pair in itertools.product(range(plan.repeats), pairs)]
        if len(table) == 1:
            carry = one(carry, table[0])
        elif table:
            carry, _ = jax.lax.scan(functools.partial(_scanned, one), carry, np.asarray(table, np.int32))
    return carry


def _places(plan: Plan, pair):
    return pair[0], pair[1] * plan.rows, pair[2] * plan.columns


def _scanned(step, carry, pair):
    return step(carry, pair), None


def _unit(plan: Plan, args, b, g):
    """The arguments of one block of units, laid out for the tiles."""
    nb, ng = plan.units

    def heads(x, size, value=0.0):  # [B T H K] -> [nb ng R*T K]: the query heads of one key head one after the other
        x = _block(_block(x, b, nb, 0), g, ng * x.shape[2] // args["k"].shape[2], 2)
        return _fill(x, 1, -x.shape[1] % size, value).swapaxes(1, 2).reshape(nb, ng, -1, *x.shape[3:])

    unit = {name: heads(args[name], plan.rows) for name in ("q", "dy", "delta") if name in args}
    unit |= {name: heads(args[name], plan.columns) for name in ("k", "v")}
    if "divisor" in args:
        unit["divisor"] = heads(args["divisor"], plan.rows, jnp.inf)  # no gradient from the rows it is filled up with
    for name in ("closed", "q_segments", "k_segments"):
        if name in args:
            unit[name] = _block(args[name], b, nb, 0)[:, None]  # [nb 1 S]
    if "bias" in args:
        unit["bias"] = _block(_block(args["bias"], b, nb, 0), g, ng, 1)
    unit["group"] = g
    return unit


def _scores(plan: Plan, unit, q, k, pair, size, masked, flip=False):
    """Scores of one pair of tiles, float32 [nb ng rows columns], -inf where a key is not visible.

    flip gives [nb ng columns rows] instead.
    """
    (head, row, column), (rows, columns) = pair, size
    across = (lambda x: x.swapaxes(-1, -2)) if flip else (lambda x: x)
    one, two = (k, q) if flip else (q, k)
    scores = jnp.einsum("bgxk,bgyk->bgxy", one, two, preferred_element_type=jnp.float32)
    if q.dtype != jnp.float32:
        scores *= plan.scale  # float32 queries come scaled
    if "bias" in unit:
        bias = _take(unit["bias"], head, 1, 2)[:, :, 0]
        scores += across(_take(_take(bias, row, rows, 2), column, columns, 3)).astype(jnp.float32)
    if "closed" in unit:
        scores += across(_take(unit["closed"], column, columns, -1)[..., None, :])
    if not masked:
        return scores
    query = row + jnp.arange(rows)
    key = column + jnp.arange(columns)
    offset = key[None, :] - (query[:, None] + plan.keys - plan.queries)
    mask = jnp.ones((1, 1), bool)
    left, right = plan.window
    if left is not None:
        mask &= offset >= -left
    if right is not None:
        mask &= offset <= right
    if plan.blocks is not None:
        mask &= _open_blocks(plan, *plan.blocks, unit, head, query, key)
    if "q_segments" in unit:
        mine = _take(unit["q_segments"], row, rows, -1)
        mask &= mine[..., :, None] == _take(unit["k_segments"], column, columns, -1)[..., None, :]
    return jnp.where(across(mask), scores, NEVER)


def _open_blocks(plan: Plan, shape, contents, unit, head, query, key):
    """The block mask of one pair of tiles, token by token: [ng or 1, rows, columns]."""
    deep, wide = shape[1:]
    table = np.frombuffer(contents, bool).reshape(*_split_heads(shape[0], plan), deep, wide)  # [G R M N]
    table = _take(_block(jnp.asarray(table), unit["group"], plan.units[1], 0), head, 1, 1)[:, 0]
    table = table[:, jnp.minimum(query // (plan.queries // deep), deep - 1)]
    return table[:, :, jnp.minimum(key // (plan.keys // wide), wide - 1)]


def _row(plan: Plan, pair):
    """Where a tile's rows start among those of all query heads of a unit."""
    return pair[0] * (plan.queries + -plan.queries % plan.rows) + pair[1]


def _scaled(plan: Plan, q):
    return plan.scale * q if q.dtype == jnp.float32 else q


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
@exact_for(lambda plan, args: (args["q"], args["k"], args["v"]))
def _attend(plan: Plan, args):
    """The running softmax: m the largest score so far, total and y the sums of exp(score - m) and of that times v."""
    v = args["v"]
    softmax = plan.activation == "softmax"
    alone = plan.keys <= plan.columns  # one tile holds all keys: nothing to take along

    def pair_step(unit, carry, pair, size, masked):
        m, total, y = carry
        rows, columns = size
        row = _row(plan, pair)
        q_i = _take(unit["q"], row, rows, 2)
        k_j, v_j = (_take(unit[name], pair[2], columns, 2) for name in ("k", "v"))
        scores = _scores(plan, unit, q_i, k_j, pair, size, masked)
        if softmax:
            highest = scores.max(-1) if alone else jnp.maximum(_take(m, row, rows, 2), scores.max(-1))
            finite = jnp.where(highest == NEVER, 0.0, highest)
            weights = jnp.exp(scores - finite[..., None])
            total_i = weights.sum(-1)
        else:
            weights = jax.nn.sigmoid(scores)
        y_i = jnp.einsum("bgts,bgsv->bgtv", weights.astype(v.dtype), v_j, preferred_element_type=jnp.float32)
        if softmax:
            if not alone:
                shrink = jnp.exp(_take(m, row, rows, 2) - finite)
                total_i += _take(total, row, rows, 2) * shrink
                y_i += _take(y, row, rows, 2) * shrink[..., None]
            m, total = _put(m, highest, row, 2), _put(total, total_i, row, 2)
        elif not alone:
            y_i += _take(y, row, rows, 2)
        return m, total, _put(y, y_i, row, 2)

    def unit_step(carry, b, g):
        unit = _unit(plan, args, b, g)
        unit["q"] = _scaled(plan, unit["q"])
        rows = unit["q"].shape[:-1]
        start = (jnp.full(rows, NEVER), jnp.zeros(rows), jnp.zeros((*rows, v.shape[-1])))
        m, total, y = _over_pairs(plan, functools.partial(pair_step, unit), start)
        nonzero = jnp.where(total == 0, 1.0, total)
        if softmax:
            y /= nonzero[..., None]
        lse = jnp.where(total == 0, NEVER, m + jnp.log(nonzero))
        return _put_heads(carry[0], y, plan.rows, b, g), _put_heads(carry[1], lse, plan.rows, b, g)

    batch, length, heads, _ = args["q"].shape
    start = jnp.zeros((batch, length, heads, v.shape[-1]), v.dtype), jnp.zeros((batch, length, heads))
    return _over_units(plan, batch, v.shape[2], unit_step, start)


def _forward(plan: Plan, args):
    y, lse = _attend(plan, args)
    return (y, lse), (args, y, lse)


@functools.partial(jax.jit, static_argnums=0)
@exact_for(lambda plan, saved, _: (saved[0]["q"], saved[0]["k"], saved[0]["v"]))
def _backward(plan: Plan, saved, cotangents):
    """With P = exp(scores - lse): dV = P^T dY; dscores = P (dY V^T - rowsum(dY y) + dlse); dQ, dK, dbias from it.

    All in transposed tiles [columns rows]: so two of the three products below need no transposed operand.
    """
    args, y, lse = saved
    dy, dlse = cotangents
    softmax = plan.activation == "softmax"
    empty = lse == NEVER
    delta = (dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1) - jnp.where(empty, 0.0, dlse)
    divisor = jnp.where(empty, jnp.inf, lse)  # exp(score - inf) = 0: an empty row has no gradient
    args = args | {"dy": dy, "delta": delta, "divisor": divisor}

    def pair_step(unit, grads, pair, size, masked):
        grads = dict(grads)
        rows, columns = size
        row, j = _row(plan, pair), pair[2]
        q_i, dy_i, delta_i, divisor_i = (_take(unit[name], row, rows, 2) for name in ("q", "dy", "delta", "divisor"))
        k_j, v_j = _take(unit["k"], j, columns, 2), _take(unit["v"], j, columns, 2)
        scores = _scores(plan, unit, q_i, k_j, pair, size, masked, flip=True)
        dweights = jnp.einsum("bgsv,bgtv->bgst", v_j, dy_i, preferred_element_type=jnp.float32)
        if softmax:
            weights = jnp.exp(scores - divisor_i[:, :, None])
            dscores = weights * (dweights - delta_i[:, :, None])
        else:
            weights = jax.nn.sigmoid(scores)
            dscores = weights * (1 - weights) * dweights

        def add(name, equation, a, b, index):
            tile = jnp.einsum(equation, a.astype(b.dtype), b, preferred_element_type=jnp.float32)
            grads[name] = _put(grads[name], _take(grads[name], index, tile.shape[2], 2) + tile, index, 2)

        add("v", "bgst,bgtv->bgsv", weights, dy_i, j)
        add("k", "bgst,bgtk->bgsk", dscores, q_i, j)
        add("q", "bgst,bgsk->bgtk", dscores, k_j, row)
        if "bias" in grads:
            grads["bias"] = _add_bias(grads["bias"], dscores.swapaxes(-1, -2), *pair)
        return grads

    def unit_step(total, b, g):
        unit = _unit(plan, args, b, g)
        unit["q"] = _scaled(plan, unit["q"])
        names = [name for name in ("q", "k", "v", "bias") if name in unit]
        grads = {name: jnp.zeros(unit[name].shape) for name in names}
        grads = _over_pairs(plan, functools.partial(pair_step, unit), grads)
        grads["q"] *= plan.scale
        if args["q"].dtype != jnp.float32:  # else the scale came with q
            grads["k"] *= plan.scale
        sizes = {"q": plan.rows, "k": plan.columns, "v": plan.columns}
        total = total | {name: _put_heads(total[name], grads[name], size, b, g) for name, size in sizes.items()}
        if "bias" in names:
            part, full = grads["bias"].shape, total["bias"].shape
            starts = (b * part[0] if full[0] > 1 else 0, g * part[1] if full[1] > 1 else 0, 0, 0, 0)
            old = jax.lax.dynamic_slice(total["bias"], starts, part)
            total["bias"] = jax.lax.dynamic_update_slice(total["bias"], old + grads["bias"], starts)
        return total

    batch, groups = args["k"].shape[0], args["k"].shape[2]
    zeros = {name: jnp.zeros(args[name].shape, args[name].dtype) for name in ("q", "k", "v")}
    if "bias" in args:
        zeros["bias"] = jnp.zeros(args["bias"].shape)
    total = _over_units(plan, batch, groups, unit_step, zeros)
    if "bias" in args:
        total["bias"] = total["bias"].astype(args["bias"].dtype)
    return ({name: total.get(name) for name in saved[0]},)


def _add_bias(total, dscores, head, row, column):
    """Adds one tile's gradient to that of the bias [B G R T S], summed over the axes along which it broadcasts."""
    tile = dscores[:, :, None]
    tile = tile.sum([axis for axis in (0, 1, 3, 4) if total.shape[axis] == 1], keepdims=True)
    starts = [0, 0, head, row, column]
    starts = [0 if full == 1 else start for full, start in zip(total.shape, starts)]
    old = jax.lax.dynamic_slice(total, starts, tile.shape)
    return jax.lax.dynamic_update_slice(total, old + tile, starts)


_attend.defvjp(_forward, _backward)
