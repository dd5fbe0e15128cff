"""What the TPU kernels of the delta rule do in a chunk: decays, the inverse, products. README.md has the derivation.

Inside a kernel everything is a value of two dimensions; a function over several heads takes and gives lists, and works
on all of them step by step, so that the scheduler finds independent work while one product is under way.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.delta_rule.tiles import Plan

LANES = 128
SUBLANES = 8
BASE = 16  # rows of the diagonal blocks that are inverted by substitution; above, by products of blocks
FORGET = -1e4  # exp of this is 0 in float32, and sums of it stay finite where -inf would give nan

_CONTRACT = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}


def dot(form, a, b, dtype):
    """a b ("nn"), a b^T ("nt") or a^T b ("tn") of operands in dtype, summed in float32."""
    left, right = _CONTRACT[form]
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((left,), (right,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def places(shape):
    """Row and column numbers."""
    return (jax.lax.broadcasted_iota(jnp.int32, shape, n) for n in (0, 1))


def below(size, strictly):
    """[t s]: s <= t, or s < t."""
    row, column = places((size, size))
    return row > column if strictly else row >= column


def sums(x, mask, parts=3):
    """x mask for a 0/1 matrix: x is cut in `parts` bfloat16 of 8 bits each, so that every product is exact."""
    found = None
    for _ in range(parts):
        part = x.astype(jnp.bfloat16)
        x = x - part.astype(jnp.float32)
        product = jax.lax.dot(part, mask, preferred_element_type=jnp.float32)
        found = product if found is None else found + product
    return found


def decays(rows, parts):
    """For the log decays of some heads, rows [n C]: exp of their sums over i <= t and over i > s, [n C] each; and for
    each head over s < i <= t, [C C], 0 where s > t. Every sum is made directly: all of its terms have one sign.
    """
    size = rows.shape[-1]
    row, column = places((size, size))
    until, after = (row <= column).astype(jnp.bfloat16), (row > column).astype(jnp.bfloat16)
    since_start, to_end = jnp.exp(sums(rows, until)), jnp.exp(sums(rows, after))
    pairs = []
    for h in range(rows.shape[0]):
        within = jnp.where(row >= column, rows[h : h + 1], 0.0)  # [t i]: i <= t
        pairs.append(jnp.where(row >= column, jnp.exp(sums(within, after, parts)), 0.0))
    return since_start, to_end, pairs


def inverses(many, dtype):
    """(I + a)^-1 of each strictly lower triangular a [C C] float32, in dtype.

    Its diagonal blocks of BASE rows by substitution; then blocks of twice the size from two,
    [A 0; B D]^-1 = [A^-1 0; -D^-1 B A^-1 D^-1], by products of operands in dtype.
    """
    size = many[0].shape[-1]
    rows = min(BASE, size)
    found = _block_inverses(many, rows)
    while rows < size:
        found = _merge(many, found, rows, dtype)
        rows *= 2
    return [x.astype(dtype) for x in found]


def _block_inverses(many, base):
    """Inverses of the blocks of `base` rows on the diagonals of I + a, in their places [C C]."""
    size = many[0].shape[-1]
    width = min(size, LANES)
    tiles = [a[n : n + width, n : n + width] for a in many for n in range(0, size, width)]
    _, column = places((base, width))
    wide = []
    for tile in _substitute([_beside(tile, base) for tile in tiles], base):
        wide.append(jnp.concatenate([jnp.where(_within(column, n, base), tile, 0.0) for n in range(0, width, base)], 0))
    if size == width:
        return wide
    count = size // width
    return [_diagonal(wide[n : n + count]) for n in range(0, len(wide), count)]


def _within(column, start, width):
    return (column >= start) & (column < start + width)


def _diagonal(tiles):
    """The block diagonal matrix of square tiles."""
    zeros = jnp.zeros_like(tiles[0])
    rows = [jnp.concatenate([tile if m == n else zeros for m in range(len(tiles))], 1) for n, tile in enumerate(tiles)]
    return jnp.concatenate(rows, 0)


def _beside(tile, base):
    """The blocks of `base` rows on the diagonal of a tile, side by side: [base width]."""
    _, column = places((base, tile.shape[-1]))
    found = tile[:base]
    for start in range(base, tile.shape[-1], base):
        found = jnp.where(column >= start, tile[start : start + base], found)
    return found


def _substitute(many, base):
    """(I + block)^-1 for blocks side by side [base width], column by column of the elimination, in float32.

    Column j of every block is spread over the block's lanes by one gather for all of `many`: the pattern of a gather
    is dear to change.
    """
    step = min(SUBLANES, base)
    width = many[0].shape[-1]
    row, column = places((step, width))
    inner = column & (base - 1)
    found = [[(row + start == inner).astype(jnp.float32) for start in range(0, base, step)] for _ in many]
    slabs = [[a[n : n + step] for n in range(0, base, step)] for a in many]
    for j in range(base - 1):
        rest = range((j + 1) // step, base // step)
        given = jnp.concatenate([a[n] for a in slabs for n in rest], 0)
        place = jnp.broadcast_to((column - inner)[:1] + j, given.shape)
        spread = jnp.take_along_axis(given, place, axis=1, mode="promise_in_bounds")
        for m, x in enumerate(found):
            pivot = x[j // step][j % step : j % step + 1]
            for n in rest:
                start = (m * len(rest) + n - rest[0]) * step
                x[n] = x[n] - spread[start : start + step] * pivot
    return [jnp.concatenate(x, 0) for x in found]


def _merge(many, found, rows, dtype):
    """From the inverses of diagonal blocks of `rows` rows to those of twice as many."""
    size = many[0].shape[-1]
    starts = range(0, size, 2 * rows)
    _, column = places((rows, size))

    def second(x):  # the second half of each pair of blocks
        return [x[start + rows : start + 2 * rows] for start in starts]

    def stacked(parts):
        return jnp.concatenate(parts, 0)

    lower = [
        stacked([jnp.where(_within(column, start, rows), part, 0.0) for start, part in zip(starts, second(a))])
        for a in many
    ]
    inner = [_dot_in_two(a, x, dtype) for a, x in zip(lower, found)]
    blank = jnp.zeros((rows, size), jnp.float32)
    inner = [stacked([part for n in range(0, size // 2, rows) for part in (blank, x[n : n + rows])]) for x in inner]
    corner = [dot("nn", stacked(second(x)), y, dtype) for x, y in zip(found, inner)]
    merged = []
    for x, y in zip(found, corner):
        parts = []
        for n, start in enumerate(starts):
            parts.append(x[start : start + rows])
            parts.append(x[start + rows : start + 2 * rows] - y[n * rows : (n + 1) * rows])
        merged.append(stacked(parts))
    return merged


def _dot_in_two(a, b, dtype):
    """a b, with a in two bfloat16 parts where dtype is bfloat16.

    Rounding a would solve another system, and keys that resemble each other multiply the difference; roundings of the
    blocks found so far are no worse than that of the result.
    """
    if dtype == jnp.float32:
        return dot("nn", a, b, dtype)
    high = a.astype(dtype)
    both = dot("nn", jnp.concatenate([high, (a - high.astype(jnp.float32)).astype(dtype)], 0), b, dtype)
    return both[: a.shape[0]] + both[a.shape[0] :]


class Part(NamedTuple):
    """What a chunk of one head needs beside the state before it; the last four None without a decay."""

    q: Any  # [C K]
    k: Any
    reads: Any  # [C C] float32: G_ts (q_t . k_s), s <= t
    alike: Any  # [C C] float32: G_ts (k_t . k_s)
    inverse: Any  # [C C], in the dtype of q
    beta: Any  # [C 1]
    pairs: Any  # [C C]: G
    since_start: Any  # [C 1]: c
    to_end: Any  # [C 1]
    total: Any  # [1 1]: c_C


def within_chunks(plan: Plan, q_ref, k_ref, gates_ref) -> list[Part]:
    """For each chunk of a grid step, and within it for each head."""
    heads, chunk, width, dtype = plan.heads, plan.chunk, plan.key_width, q_ref.dtype
    strict, lower = below(chunk, True), below(chunk, False)
    parts, among = [], []
    for j in range(plan.per_step):
        rows = gates_ref[0, 0, j]
        pairs = None
        if plan.gated:
            since_start, to_end, pairs = decays(rows[heads : 2 * heads], plan.decay_parts)
            rows = jnp.concatenate([rows[:heads], since_start, to_end], 0)
            if rows.shape[0] % SUBLANES:
                rows = jnp.concatenate([rows, jnp.zeros((-rows.shape[0] % SUBLANES, chunk), jnp.float32)], 0)
        columns = rows.T
        for h in range(heads):
            q, k = (x[0, j * chunk : (j + 1) * chunk, h * width : (h + 1) * width] for x in (q_ref, k_ref))
            alike = dot("nt", jnp.concatenate([k, q], 0), k, dtype)
            alike, reads = alike[:chunk], alike[chunk:]
            decay = (None,) * 4
            if pairs is not None:
                alike, reads = alike * pairs[h], reads * pairs[h]
                since, to = (columns[:, n * heads + h : n * heads + h + 1] for n in (1, 2))
                decay = (pairs[h], since, to, since_start[h : h + 1, chunk - 1 :])
            beta = columns[:, h : h + 1]
            among.append(jnp.where(strict, beta * alike, 0.0))
            parts.append(Part(q, k, jnp.where(lower, reads, 0.0), alike, None, beta, *decay))
    return [part._replace(inverse=x) for part, x in zip(parts, inverses(among, dtype))]


def decayed_keys(part: Part):
    """K~ [C K]: each key with what is left of it at the end of the chunk."""
    return part.k if part.to_end is None else part.to_end * part.k.astype(jnp.float32)
