"""Chunkwise parallel form: quadratic inside a chunk, the state carried between chunks; runs everywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels_pallas import dispatch

CHUNK = 64  # tokens, a power of two
BLOCK = 512  # tokens a step of the scan: as many chunks as stay in a core's cache
VECTOR_BLOCK = 256  # with a decay a key channel, which needs more room a token
PAIRWISE = 8  # with a decay a key channel: so many tokens are paired one by one, more by halves
FORGET = -1e4  # exp of this is 0 in float32, and sums of it stay finite where -inf would give nan


def linear_attention_chunked(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None,
    state: Float[Array, "B H K V"],
    *,
    chunk: int = CHUNK,
    block: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """y (float32) and the last state of api.linear_attention, before any normalisation.

    Rows and tokens are cut into blocks of about `block` tokens in all, whatever B and T are, so that a step of the
    loops costs the same for many short rows and for few long ones; the chunks of a block are worked on at once.
    Memory saved for the backward pass: the inputs and one state a block; the rest is recomputed.
    """
    batch, length, _, _ = q.shape
    vector = log_decay is not None and log_decay.ndim == 4
    block = block or (VECTOR_BLOCK if vector else BLOCK)
    chunk = min(chunk, 1 << (length - 1).bit_length())
    blocks = -(-length // max(block, chunk))
    size = -(-length // (blocks * chunk)) * chunk
    looped = dispatch.platform() == "cpu"  # elsewhere all rows at once
    rows = _divisor(batch, max(1, block // size)) if looped else batch

    def cut(x):  # [B T *] -> [B/rows blocks rows size *], filled up with zeros: k = 0 and no decay change nothing
        x = jnp.pad(x, [(0, 0), (0, blocks * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch // rows, rows, blocks, size, *x.shape[2:]), 2, 1)

    if log_decay is not None:
        log_decay = jnp.maximum(log_decay, FORGET)
    inputs = jax.tree.map(cut, (q, k, v, log_decay))
    body = jax.checkpoint(functools.partial(_block, chunk=chunk))
    one = lambda group: jax.lax.scan(body, *group)  # noqa: E731
    groups = state.reshape(batch // rows, rows, *state.shape[1:]), inputs
    if rows == batch:
        last, y = jax.tree.map(lambda x: x[None], one(jax.tree.map(lambda x: x[0], groups)))
    else:
        last, y = jax.lax.map(one, groups)
    y = jnp.moveaxis(y, 1, 2).reshape(batch, blocks * size, *y.shape[4:])
    return y[:, :length], last.reshape(state.shape)


def _divisor(batch, most):
    return max(n for n in range(1, min(batch, most) + 1) if batch % n == 0)


def _block(state, inputs, *, chunk):
    """The chunks of a block: pairs inside each, the state before each, and y = weights v + (q exp(since)) S."""
    q, k, v, g = jax.tree.map(lambda x: _chunks(x, chunk), inputs)  # [B N H C *], g None without decay
    kept = None
    if g is None:
        weights = jnp.tril(jnp.einsum("bnhtk,bnhsk->bnhts", q, k))
    else:
        weights, since, until = _scalar_decay(q, k, g) if g.ndim == 4 else _vector_decay(q, k, g)
        q, k = q * jnp.exp(since), k * jnp.exp(until)
        kept = jnp.exp(since[..., -1, :]).swapaxes(0, 1)[..., None]  # [N B H (1 or K) 1]
    products = jnp.einsum("bnhsk,bnhsv->nbhkv", k, v)

    def next_state(state, inputs):
        product, kept = inputs
        return product + (state if kept is None else kept * state), state

    state, before = jax.lax.scan(next_state, state, (products, kept))
    y = jnp.einsum("bnhts,bnhsv->bnhtv", weights, v) + jnp.einsum("bnhtk,nbhkv->bnhtv", q, before)
    batch, count, heads, _, width = y.shape
    return state, y.swapaxes(2, 3).reshape(batch, count * chunk, heads, width)


def _chunks(x, chunk):
    """[B L H *] -> [B N H C *], float32."""
    return x.astype(jnp.float32).reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(2, 3)


def _scalar_decay(q, k, g):
    """Pairs times exp(g_{s+1} + ... + g_t), [.. C C]; sums of g since the start and until the end, [.. C 1]."""
    size = g.shape[-1]
    within = np.tri(size, dtype=np.float32)  # [t i]: i <= t
    since = jnp.einsum("ti,...i->...t", within, g)
    until = jnp.einsum("is,...i->...s", np.tri(size, k=-1, dtype=np.float32), g)
    between = jnp.einsum("...ti,is->...ts", within * g[..., None, :], np.tri(size, k=-1, dtype=np.float32))
    pairs = jnp.einsum("...tk,...sk->...ts", q, k) * jnp.where(within > 0, jnp.exp(between), 0.0)
    return pairs, since[..., None], until[..., None]


def _vector_decay(q, k, g):
    """As _scalar_decay, with a decay a key channel; the sums are [.. C K].

    Few tokens are paired one by one. Twice as many then are two halves with their pairs done; a query t of the second
    and a key s of the first meet at the border, (q_t exp(sum from the border to t)) . (k_s exp(sum from s to it)), one
    matrix product; and so on up to the chunk. Every exponent is a direct sum of decays, so never positive.
    """
    *lead, size, width = g.shape
    few = min(PAIRWISE, size)
    q, k, g = (x.reshape(*lead, size // few, few, width) for x in (q, k, g))
    order = np.arange(few)
    select = (order[None, None] > order[None, :, None]) & (order[None, None] <= order[:, None, None])  # [t s i]
    between = jnp.einsum("tsi,...ik->...tsk", select.astype(np.float32), g)
    decay = jnp.where(np.tri(few, dtype=bool)[..., None], jnp.exp(between), 0.0)
    pairs = jnp.einsum("...tk,...sk,...tsk->...ts", q, k, decay)
    since = jnp.einsum("ti,...ik->...tk", np.tri(few, dtype=np.float32), g)
    until = jnp.einsum("is,...ik->...sk", np.tri(few, k=-1, dtype=np.float32), g)
    while few < size:
        halves = lambda x: jnp.moveaxis(x.reshape(*lead, -1, 2, *x.shape[-2:]), -3, 0)  # noqa: E731
        (q0, q1), (k0, k1), (since0, since1), (until0, until1) = map(halves, (q, k, since, until))
        pairs0, pairs1 = halves(pairs)
        cross = jnp.einsum("...tk,...sk->...ts", q1 * jnp.exp(since1), k0 * jnp.exp(until0))
        upper = jnp.concatenate([pairs0, jnp.zeros_like(cross)], -1)
        pairs = jnp.concatenate([upper, jnp.concatenate([cross, pairs1], -1)], -2)
        q, k = jnp.concatenate([q0, q1], -2), jnp.concatenate([k0, k1], -2)
        since = jnp.concatenate([since0, since1 + since0[..., -1:, :]], -2)
        until = jnp.concatenate([until0 + since1[..., -1:, :], until1], -2)
        few *= 2
    return pairs[..., 0, :, :], since[..., 0, :, :], until[..., 0, :, :]
