"""The forward TPU kernel of attention: a row of tiles after another, with a running softmax."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import mosaic_tpu
from kernels_pallas.attention import pallas_tpu_tile as tile
from kernels_pallas.attention.pallas_tpu_table import FIRST, LAST, table
from kernels_pallas.attention.tiles_tpu import VMEM, Plan


def forward(plan: Plan, q, k, v, q_marks, k_marks, *, cost):
    """q [B T H*K], k, v [B S G*K]; marks [B 1 T], [B 1 S] or None. y [B T H*V]; lse / log 2 [B H 1 T], or None."""
    sizes, packs = plan.forward, plan.heads // plan.pack
    found = table(plan, sizes, False)
    per_head = found.steps if plan.sets > 1 else 0

    def at(h, n):
        return h * per_head + n

    def rows(b, h, n, rows_ref, *_):
        return b, rows_ref[at(h, n)], h

    def columns(b, h, n, rows_ref, columns_ref, *_):
        return b, columns_ref[at(h, n)], jax.lax.div(h, plan.repeats)

    arrays = [q, k, v]
    specs = [
        pl.BlockSpec((1, sizes.rows, plan.width), rows),
        pl.BlockSpec((1, sizes.columns, plan.width), columns),
        pl.BlockSpec((1, sizes.columns, plan.value_width), columns),
    ]
    if plan.marked:
        arrays += [q_marks, k_marks]
        specs += [
            pl.BlockSpec((1, 1, sizes.rows), lambda b, h, n, rows_ref, *_: (b, 0, rows_ref[at(h, n)])),
            pl.BlockSpec((1, 1, sizes.columns), lambda b, h, n, _, columns_ref, *__: (b, 0, columns_ref[at(h, n)])),
        ]
    if found.masks is not None:
        arrays.append(jnp.asarray(found.masks))
        specs.append(pl.BlockSpec((1, *found.masks.shape[1:]), lambda b, h, n, *refs: (refs[3][at(h, n)], 0, 0)))
    softmax = plan.activation == "softmax"
    out_shape = [jax.ShapeDtypeStruct((*q.shape[:2], packs * plan.value_width), v.dtype)]
    out_specs = [pl.BlockSpec((1, sizes.rows, plan.value_width), rows)]
    if softmax:
        out_shape.append(jax.ShapeDtypeStruct((q.shape[0], plan.heads, 1, q.shape[1]), jnp.float32))
        block = (1, plan.pack, 1, sizes.rows)
        out_specs.append(pl.BlockSpec(block, lambda b, h, n, rows_ref, *_: (b, h, 0, rows_ref[at(h, n)])))
    line = (plan.pack, 1, sizes.rows)
    scratch = [
        pltpu.VMEM((plan.pack, sizes.rows, plan.width), q.dtype),
        pltpu.VMEM((plan.pack, plan.value_width // plan.pack, sizes.rows), jnp.float32),
        *([pltpu.VMEM(line, jnp.float32)] * 2 if softmax else []),
    ]
    call = mosaic_tpu.call(
        functools.partial(_kernel, plan, found, at, found.masks is not None),
        name="attention_forward",
        grid=(q.shape[0], packs, found.steps),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        semantics=("parallel", "parallel", "arbitrary"),
        cost=cost,
        interpret=plan.interpret,
        scalar_prefetch=4,
        vmem=VMEM,
        working=3 * sizes.columns * sizes.rows * 4,
        dtypes=[x.dtype for x in arrays],
    )
    tables = (found.rows, found.columns, found.flags, found.parts)
    y, *lse = call(*(jnp.asarray(x.ravel()) for x in tables), *arrays)
    return y, lse[0] if softmax else None


def _kernel(plan, found, at, pieces, rows_ref, columns_ref, flags_ref, _, q_ref, k_ref, v_ref, *refs):
    refs = list(refs)
    marks = (refs.pop(0), refs.pop(0)) if plan.marked else None
    piece = refs.pop(0) if pieces else None
    softmax = plan.activation == "softmax"
    if softmax:
        y_ref, lse_ref, scaled_ref, sum_ref, most_ref, total_ref = refs
    else:
        y_ref, scaled_ref, sum_ref = refs
        lse_ref = most_ref = total_ref = None
    step = at(pl.program_id(1), pl.program_id(2))
    flags = flags_ref[step]

    @pl.when((flags & FIRST) > 0)
    def _():
        q = tile.scaled(plan, q_ref[0])
        for p in range(plan.pack):
            scaled_ref[p] = tile.one_head(plan, q, p)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        if softmax:
            most_ref[...] = jnp.full_like(most_ref, tile.LEAST)
            total_ref[...] = jnp.zeros_like(total_ref)

    def body(how):
        mask = tile.Mask(plan, plan.forward, how, rows_ref[step], columns_ref[step], marks, piece)
        _tile(plan, mask, k_ref, v_ref, scaled_ref, sum_ref, most_ref, total_ref)

    tile.branches(found, flags, body)

    @pl.when((flags & LAST) > 0)
    def _():
        sums = []
        for p in range(plan.pack):
            if not softmax:
                sums.append(sum_ref[p])
                continue
            total = total_ref[p]
            empty = total == 0.0
            total = jnp.where(empty, 1.0, total)
            sums.append(sum_ref[p] / total)
            lse_ref[0, p] = jnp.where(empty, -jnp.inf, most_ref[p] + jnp.log2(total))
        y_ref[0] = jnp.concatenate(sums, 0).T.astype(y_ref.dtype)


def _tile(plan, mask, k_ref, v_ref, scaled_ref, sum_ref, most_ref, total_ref):
    """One tile: the scores of every part first, so that their products run beside the softmax of others."""
    sizes = plan.forward
    parts = range(sizes.columns // sizes.part_columns)
    keys = [k_ref[0, c * sizes.part_columns : (c + 1) * sizes.part_columns] for c in parts]
    values = v_ref[0].T  # [V C]
    for p in range(plan.pack):
        value = tile.head_rows(plan, values, p)
        value = [value[:, c * sizes.part_columns : (c + 1) * sizes.part_columns] for c in parts]
        for r in range(sizes.rows // sizes.part_rows):
            at = slice(r * sizes.part_rows, (r + 1) * sizes.part_rows)
            seen = [c for c in parts if not mask.empty(c, r)]
            if not seen:
                continue
            q = scaled_ref[p, at]
            scores = [mask.apply(tile.product(keys[c], q, (1, 1)), c, r) for c in seen]  # [C R]
            before = sum_ref[p, :, at]
            if plan.activation == "softmax":
                most = functools.reduce(jnp.maximum, [s.max(0, keepdims=True) for s in scores], most_ref[p, :, at])
                weights = [jnp.exp2(s - most) for s in scores]
                fade = jnp.exp2(most_ref[p, :, at] - most)
                total_ref[p, :, at] = total_ref[p, :, at] * fade + sum(w.sum(0, keepdims=True) for w in weights)
                most_ref[p, :, at] = most
                before = before * fade
            else:
                weights = [0.5 + 0.5 * jnp.tanh(jnp.maximum(s, tile.LEAST)) for s in scores]
            for c, w in zip(seen, weights):
                before += tile.product(value[c], w.astype(values.dtype), (1, 0))
            sum_ref[p, :, at] = before
