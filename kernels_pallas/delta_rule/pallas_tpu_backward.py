"""The backward kernel of the delta rule on TPU: the chunks in reverse, dS in VMEM. README.md has the derivation."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import mosaic_tpu
from kernels_pallas.delta_rule.pallas_tpu_chunk import below, decayed_keys, dot, places, sums, within_chunks
from kernels_pallas.delta_rule.tiles import Plan


def backward(plan: Plan, q, k, v, dy, gates, states, dlast, *, cost):
    """dq, dk, dv (shapes and dtypes of theirs), dgates as gates and dstate [B H K V] float32.

    states: those before each chunk, [B chunks H K V], as the forward kernel saved them; dy [B T H*V].
    """
    batch, length, _ = q.shape
    heads, chunk, per, width, deep = plan.heads, plan.chunk, plan.per_step, plan.key_width, plan.value_width
    groups, steps = gates.shape[1], length // (chunk * per)

    def tokens(size):
        return pl.BlockSpec((1, per * chunk, heads * size), lambda b, h, c: (b, steps - 1 - c, h))

    one_state = pl.BlockSpec((1, heads, width, deep), lambda b, h, c: (b, h, 0, 0))
    rows = pl.BlockSpec((1, 1, per, gates.shape[3], chunk), lambda b, h, c: (b, h, steps - 1 - c, 0, 0))
    boundaries = pl.BlockSpec((1, per, heads, width, deep), lambda b, h, c: (b, steps - 1 - c, h, 0, 0))
    return mosaic_tpu.call(
        functools.partial(_kernel, plan=plan),
        name="delta_rule_backward",
        grid=(batch, groups, steps),
        in_specs=[tokens(width), tokens(width), tokens(deep), tokens(deep), rows, boundaries, one_state],
        out_specs=[tokens(width), tokens(width), tokens(deep), rows, one_state],
        out_shape=[
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)),
            jax.ShapeDtypeStruct(gates.shape, jnp.float32),
            jax.ShapeDtypeStruct(dlast.shape, jnp.float32),
        ],
        semantics=("parallel", "parallel", "arbitrary"),
        cost=cost,
        interpret=plan.interpret,
        vmem=plan.vmem,
        working=plan.working,
        dtypes=[q.dtype, q.dtype, v.dtype, dy.dtype, jnp.float32, states.dtype, jnp.float32],
    )(q, k, v, dy, gates, states, dlast)


def _kernel(
    q_ref, k_ref, v_ref, dy_ref, gates_ref, states_ref, dlast_ref,
    dq_ref, dk_ref, dv_ref, dgates_ref, dstate_ref,
    *, plan: Plan,
):  # fmt: skip
    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate_ref[...] = dlast_ref[...]

    heads, chunk, width, deep, dtype = plan.heads, plan.chunk, plan.key_width, plan.value_width, q_ref.dtype
    strict, lower = below(chunk, True), below(chunk, False)
    each = range(heads)
    within = within_chunks(plan, q_ref, k_ref, gates_ref)
    dstates = [dstate_ref[0, h] for h in each]
    for j in reversed(range(plan.per_step)):
        rows = pl.ds(j * chunk, chunk)
        parts = within[j * heads : (j + 1) * heads]
        keys = [slice(h * width, (h + 1) * width) for h in each]
        values = [slice(h * deep, (h + 1) * deep) for h in each]
        state, dy = [states_ref[0, j, h] for h in each], [dy_ref[0, rows, values[h]] for h in each]
        after = [x.astype(dtype) for x in dstates]

        found = [dot("nn", x.k, s, dtype) for x, s in zip(parts, state)]
        if plan.gated:
            found = [x.since_start * y for x, y in zip(parts, found)]
        missing = [v_ref[0, rows, values[h]].astype(jnp.float32) - found[h] for h in each]
        updates = [dot("nn", x.inverse, x.beta * y, dtype).astype(dtype) for x, y in zip(parts, missing)]

        dupdates = [
            dot("tn", x.reads, d, dtype) + dot("nn", decayed_keys(x), s, dtype) for x, d, s in zip(parts, dy, after)
        ]
        dscaled = [dot("tn", x.inverse, d, dtype) for x, d in zip(parts, dupdates)]  # of beta * missing
        dmissing = [x.beta * d for x, d in zip(parts, dscaled)]
        for h in each:
            dv_ref[0, rows, values[h]] = dmissing[h].astype(dv_ref.dtype)
        read = [jnp.concatenate([-d, e.astype(jnp.float32)], 0) for d, e in zip(dmissing, dy)]  # of S^T [k; q]
        if plan.gated:
            read = [jnp.concatenate([x.since_start, x.since_start], 0) * y for x, y in zip(parts, read)]
        read = [x.astype(dtype) for x in read]
        both = [jnp.concatenate([x.k, x.q], 0) for x in parts]  # [2C K]
        from_state = [dot("nt", r, s, dtype) for r, s in zip(read, state)]  # [2C K]
        dkeys = [dot("nt", u, s, dtype) for u, s in zip(updates, after)]
        pairs = [dot("nt", jnp.concatenate([d.astype(dtype), e], 0), u, dtype) for d, e, u in zip(dscaled, dy, updates)]
        damong = [jnp.where(strict, -x[:chunk], 0.0) for x in pairs]
        dreads = [jnp.where(lower, x[chunk:], 0.0) for x in pairs]
        kept = dstates
        if plan.gated:
            dkeys = [x.to_end * d for x, d in zip(parts, dkeys)]
            kept = [x.total * s for x, s in zip(parts, dstates)]
        dstates = [s + dot("tn", b, r, dtype) for s, b, r in zip(kept, both, read)]

        gates = _Gates(plan)
        for h, x in enumerate(parts):
            gates.beta(h, dscaled[h] * missing[h], damong[h] * x.alike)
            if plan.gated:
                dk, dq = from_state[h][:chunk], from_state[h][chunk:]
                gates.decay(h, x, damong[h], dreads[h], dq, dk, dkeys[h], state[h], kept[h])
        dgates_ref[0, 0, j] = gates.rows(dgates_ref.shape[3])

        dalike = [x.beta * d for x, d in zip(parts, damong)]
        if plan.gated:
            dalike = [x.pairs * d for x, d in zip(parts, dalike)]
            dreads = [x.pairs * d for x, d in zip(parts, dreads)]
        pairs = [jnp.concatenate([d, e], 0).astype(dtype) for d, e in zip(dalike, dreads)]
        direct = [dot("nn", p, x.k, dtype) for x, p in zip(parts, pairs)]
        crossed = [dot("tn", p, b, dtype) for p, b in zip(pairs, both)]
        for h in each:
            total = from_state[h][:chunk] + dkeys[h] + direct[h][:chunk] + crossed[h]
            dk_ref[0, rows, keys[h]] = total.astype(dk_ref.dtype)
            dq_ref[0, rows, keys[h]] = (from_state[h][chunk:] + direct[h][chunk:]).astype(dq_ref.dtype)
    for h in each:
        dstate_ref[0, h] = dstates[h]


class _Gates:
    """Collects what a chunk's gates get, as columns: first dbeta of each head, then two sums for its decays."""

    def __init__(self, plan):
        self.plan = plan
        self.columns = jnp.zeros((plan.chunk, 128), jnp.float32)
        self.across = []  # [1 C] of each head
        self.whole = []  # [1 1]

    def _put(self, place, column):
        _, lane = places(self.columns.shape)
        self.columns = jnp.where(lane == place, column, self.columns)

    def beta(self, h, by_value, by_pair):
        self._put(h, jnp.sum(by_value, 1, keepdims=True) + jnp.sum(by_pair, 1, keepdims=True))

    def decay(self, h, part, damong, dreads, dq, dk, dkeys, state, kept):
        """The exponents are sums over tokens: those up to t in c_t, after s in K~_s, s < i <= t in G_ts, all in c_C."""
        heads = self.plan.heads
        pairs = damong * (part.beta * part.alike) + dreads * part.reads
        q, k = part.q.astype(jnp.float32), part.k.astype(jnp.float32)
        self._put(heads + h, jnp.sum(q * dq + k * dk, 1, keepdims=True) + jnp.sum(pairs, 1, keepdims=True))
        self._put(2 * heads + h, jnp.sum(k * dkeys, 1, keepdims=True))
        self.across.append(jnp.sum(pairs, 0, keepdims=True))
        total = jnp.sum(state.astype(jnp.float32) * kept, 0, keepdims=True)
        self.whole.append(jnp.sum(total, 1, keepdims=True))

    def rows(self, count):
        """[count C]: dbeta of each head, then its dlog_decay."""
        heads, chunk = self.plan.heads, self.plan.chunk
        rows = self.columns.T
        found = [rows[:heads]]
        if self.plan.gated:
            row, column = places((chunk, chunk))
            until = rows[heads : 2 * heads] - jnp.concatenate(self.across, 0)
            found.append(
                sums(until, (row >= column).astype(jnp.bfloat16))
                + sums(rows[2 * heads : 3 * heads], (row < column).astype(jnp.bfloat16))
                + jnp.concatenate(self.whole, 0)
            )
        more = count - sum(x.shape[0] for x in found)
        if more:
            found.append(jnp.zeros((more, chunk), jnp.float32))
        return jnp.concatenate(found, 0)
