"""The backward TPU kernels of attention: one for dk, dv and dq, or where dq does not fit beside them one for dq alone.

Column by column of tiles, dk and dv are summed up in VMEM, and so is dq of every row that is not complete: the table
says where, and which row is written next. Rows take their places over from complete ones, so that a window needs few.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import mosaic_tpu
from kernels_pallas.attention import pallas_tpu_tile as tile
from kernels_pallas.attention.pallas_tpu_table import FIRST, FIRST_ROWS, LAST, LAST_ROWS, table
from kernels_pallas.attention.tiles_tpu import SLOTS, VMEM, Plan


def fused(plan: Plan) -> bool:
    """Whether dq of all rows that are open at once fits in VMEM."""
    slots = table(plan, plan.backward, True).most_slots
    return slots * plan.repeats * plan.backward.rows * plan.width * 4 <= SLOTS


def backward(plan: Plan, q, k, v, dy, lse, delta, q_marks, k_marks, *, cost):
    """As forward; lse in powers of two and delta [B H 1 T] or None. dq, dk, dv like q, k, v."""
    given = (q, k, v, dy, lse, delta, q_marks, k_marks)
    if fused(plan):
        return _call(plan, True, True, "attention_backward", given, cost)
    (dq,) = _call(plan, True, False, "attention_backward_dq", given, cost)
    dk, dv = _call(plan, False, True, "attention_backward_dkv", given, cost)
    return dq, dk, dv


def products(plan: Plan, y, dy, *, cost):
    """y_t . dy_t of each head, [B T H*V] -> [B H 1 T]: here, as XLA would lay both out anew to sum over V."""
    sizes = plan.backward
    rows = pl.BlockSpec((1, sizes.rows, plan.value_width), lambda b, h, n: (b, n, h))
    return mosaic_tpu.call(
        functools.partial(_products, plan),
        name="attention_backward_products",
        grid=(y.shape[0], plan.heads // plan.pack, y.shape[1] // sizes.rows),
        in_specs=[rows, rows],
        out_specs=pl.BlockSpec((1, plan.pack, 1, sizes.rows), lambda b, h, n: (b, h, 0, n)),
        out_shape=jax.ShapeDtypeStruct((y.shape[0], plan.heads, 1, y.shape[1]), jnp.float32),
        semantics=("parallel",) * 3,
        cost=cost,
        interpret=plan.interpret,
        dtypes=(y.dtype, dy.dtype),
    )(y, dy)


def _products(plan, y_ref, dy_ref, out_ref):
    both = y_ref[0].astype(jnp.float32) * dy_ref[0].astype(jnp.float32)
    lane = jax.lax.broadcasted_iota(jnp.int32, (8, plan.value_width), 1)
    each = plan.value_width // plan.pack
    head = jax.lax.broadcasted_iota(jnp.int32, lane.shape, 0) * each
    mine = jnp.where((lane >= head) & (lane < head + each), 1.0, 0.0)
    sums = tile.product(mine, both, (1, 1))  # [8 R], a row a head
    for p in range(plan.pack):
        out_ref[0, p] = sums[p : p + 1]


def _call(plan, for_rows, for_columns, name, given, cost):
    """for_rows: makes dq; for_columns: makes dk and dv."""
    q, k, v, dy, lse, delta, q_marks, k_marks = given
    sizes, repeats = plan.backward, plan.repeats
    found = table(plan, sizes, for_columns)
    per_head = found.steps if plan.sets > 1 else 0
    softmax = plan.activation == "softmax"

    def at(g, n):
        return g * per_head + n

    def head(g, r):
        return g * repeats + r

    def rows(b, g, n, r, rows_ref, *_):
        return b, rows_ref[at(g, n)], head(g, r)

    def columns(b, g, n, r, rows_ref, columns_ref, *_):
        return b, columns_ref[at(g, n)], g

    def line(b, g, n, r, rows_ref, *_):
        return b, head(g, r), 0, rows_ref[at(g, n)]

    def ready(b, g, n, r, *refs):
        return b, refs[4][at(g, n)], g

    arrays = [q, k, v, dy]
    specs = [
        pl.BlockSpec((1, sizes.rows, plan.width), rows),
        pl.BlockSpec((1, sizes.columns, plan.width), columns),
        pl.BlockSpec((1, sizes.columns, plan.value_width), columns),
        pl.BlockSpec((1, sizes.rows, plan.value_width), rows),
    ]
    if softmax:
        arrays += [lse, delta]
        specs += [pl.BlockSpec((1, plan.pack, 1, sizes.rows), line)] * 2
    if plan.marked:
        arrays += [q_marks, k_marks]
        specs += [
            pl.BlockSpec((1, 1, sizes.rows), lambda b, g, n, r, rows_ref, *_: (b, 0, rows_ref[at(g, n)])),
            pl.BlockSpec((1, 1, sizes.columns), lambda b, g, n, r, _, columns_ref, *__: (b, 0, columns_ref[at(g, n)])),
        ]
    if found.masks is not None:
        arrays.append(jnp.asarray(found.masks))
        specs.append(pl.BlockSpec((1, *found.masks.shape[1:]), lambda b, g, n, r, *refs: (refs[5][at(g, n)], 0, 0)))
    out_shape, out_specs, scratch = [], [], []
    if for_rows:
        slots = found.most_slots if for_columns else 1
        out_shape.append(jax.ShapeDtypeStruct(q.shape, q.dtype))
        out_specs.append(pl.BlockSpec((1, sizes.rows, repeats * plan.width), ready))
        scratch.append(pltpu.VMEM((slots * repeats, plan.width, sizes.rows), jnp.float32))
    if for_columns:
        out_shape += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)]
        out_specs += specs[1:3]
        scratch += [pltpu.VMEM((sizes.columns, width), jnp.float32) for width in (plan.width, plan.value_width)]
    call = mosaic_tpu.call(
        functools.partial(_kernel, plan, found, at, for_rows, for_columns),
        name=name,
        grid=(q.shape[0], plan.groups // plan.pack, found.steps, repeats),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        cost=cost,
        interpret=plan.interpret,
        scalar_prefetch=6,
        vmem=VMEM,
        working=4 * sizes.columns * sizes.part_rows * 4,
        dtypes=[x.dtype for x in arrays],
    )
    tables = (found.rows, found.columns, found.flags, found.slots, found.ready, found.parts)
    return call(*(jnp.asarray(x.ravel()) for x in tables), *arrays)


def _kernel(plan, found, at, for_rows, for_columns, rows_ref, columns_ref, flags_ref, slots_ref, *refs):
    repeats, softmax = plan.repeats, plan.activation == "softmax"
    left = list(refs[2:])
    q_ref, k_ref, v_ref, dy_ref = (left.pop(0) for _ in range(4))
    lse_ref, delta_ref = (left.pop(0), left.pop(0)) if softmax else (None, None)
    marks = (left.pop(0), left.pop(0)) if plan.marked else None
    piece = left.pop(0) if found.masks is not None else None
    dq_ref = left.pop(0) if for_rows else None
    dk_ref, dv_ref = (left.pop(0), left.pop(0)) if for_columns else (None, None)
    dq_sum = left.pop(0) if for_rows else None
    dk_sum, dv_sum = left if for_columns else (None, None)
    step, repeat = at(pl.program_id(1), pl.program_id(2)), pl.program_id(3)
    flags = flags_ref[step]
    slot = (slots_ref[step] if for_columns else 0) * repeats + repeat
    begins, ends = (FIRST_ROWS, LAST_ROWS) if for_columns else (FIRST, LAST)
    factor = plan.scale / tile.fold(plan)

    if for_columns:

        @pl.when(((flags & FIRST) > 0) & (repeat == 0))
        def clear_columns():
            dk_sum[...] = jnp.zeros_like(dk_sum)
            dv_sum[...] = jnp.zeros_like(dv_sum)

    if for_rows:

        @pl.when((flags & begins) > 0)
        def clear_rows():
            dq_sum[slot] = jnp.zeros(dq_sum.shape[1:], jnp.float32)

    def body(how):
        mask = tile.Mask(plan, plan.backward, how, rows_ref[step], columns_ref[step], marks, piece)
        _tile(plan, mask, (q_ref, k_ref, v_ref, dy_ref, lse_ref, delta_ref), dq_sum, slot, dk_sum, dv_sum)

    tile.branches(found, flags, body)

    if for_rows:
        for r in range(repeats):

            @pl.when(((flags & ends) > 0) & (repeat == r))
            def _(r=r):
                dq = dq_sum[slot].T * plan.scale
                dq_ref[0, :, r * plan.width : (r + 1) * plan.width] = dq.astype(dq_ref.dtype)

    if for_columns:

        @pl.when(((flags & LAST) > 0) & (repeat == repeats - 1))
        def _():
            dk_ref[0] = (dk_sum[...] * factor).astype(dk_ref.dtype)
            dv_ref[0] = dv_sum[...].astype(dv_ref.dtype)


def _tile(plan, mask, refs, dq_sum, slot, dk_sum, dv_sum):
    q_ref, k_ref, v_ref, dy_ref, lse_ref, delta_ref = refs
    sizes, softmax = plan.backward, plan.activation == "softmax"
    parts = range(sizes.columns // sizes.part_columns)
    if dq_sum is not None:
        turned = k_ref[0].T
    for r in range(sizes.rows // sizes.part_rows):
        at = slice(r * sizes.part_rows, (r + 1) * sizes.part_rows)
        q_all, dy_all = tile.scaled(plan, q_ref[0, at]), dy_ref[0, at]
        for p in range(plan.pack):
            q, dy = tile.one_head(plan, q_all, p), tile.one_head(plan, dy_all, p)
            lanes = slice(p * plan.width // plan.pack, (p + 1) * plan.width // plan.pack)
            for c in parts:
                if mask.empty(c, r):
                    continue
                here = slice(c * sizes.part_columns, (c + 1) * sizes.part_columns)
                scores = mask.apply(tile.product(k_ref[0, here], q, (1, 1)), c, r)  # [C R]
                dweights = tile.product(v_ref[0, here], dy, (1, 1))
                if softmax:
                    weights = jnp.exp2(scores - lse_ref[0, p, :, at])
                    dscores = weights * (dweights - delta_ref[0, p, :, at])
                else:
                    weights = 0.5 + 0.5 * jnp.tanh(jnp.maximum(scores, tile.LEAST))
                    dscores = weights * (1 - weights) * dweights
                dscores = dscores.astype(q.dtype)
                if dv_sum is not None:
                    dv_sum[here] += tile.product(weights.astype(dy.dtype), dy, (1, 0))
                    dk_sum[here] += tile.product(dscores, q, (1, 0))
                if dq_sum is not None:
                    dq_sum[slot, lanes, at] += tile.product(turned[lanes, here], dscores, (1, 0))
