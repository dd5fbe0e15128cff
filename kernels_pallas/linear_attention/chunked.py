"""Chunkwise parallel form: quadratic inside a chunk, the state carried between chunks; runs everywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels_pallas import blocks, dispatch
from kernels_pallas.precision import HIGHEST, exact_for

# By platform; None: any that is not a CPU. Those are by reasoning and not measured: products of 128 fill a GPU's matrix
# units, and 8K tokens are some 2000 of them a step at 16 heads, where a loop's step costs several launches.
CHUNK = {"cpu": 64, None: 128}  # tokens, a power of two
BLOCK = {"cpu": 512, None: 8192}  # tokens a step, over all rows: on a CPU as many chunks as stay in a core's cache
VECTOR_BLOCK = {"cpu": 256, None: 4096}  # with a decay a key channel, which needs more room a token
PAIRWISE = 8  # with a decay a key channel: so many tokens are paired one by one, more by halves
FORGET = -1e4  # exp of this is 0 in float32, and sums of it stay finite where -inf would give nan


def linear_attention_chunked(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None,
    state: Float[Array, "B H K V"],
    *,
    chunk: int | None = None,
    block: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """y (float32) and the last state of api.linear_attention, before any normalisation.

    Memory saved for the backward pass: the inputs and one state a block; the rest is recomputed.
    """
    batch, length, _, _ = q.shape
    vector = log_decay is not None and log_decay.ndim == 4
    platform = "cpu" if dispatch.platform() == "cpu" else None
    chunk = min(chunk or CHUNK[platform], 1 << (length - 1).bit_length())
    tokens = block or (VECTOR_BLOCK if vector else BLOCK)[platform]
    cut = blocks.cut(batch, length, tokens, chunk, platform == "cpu")
    return _attend(cut, chunk, (q, k, v, log_decay), state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
@functools.partial(jax.jit, static_argnums=(0, 1))
def _attend(cut, chunk, inputs, state):
    body = lambda state, x, _: (*_block(state, x, chunk=chunk), None)  # noqa: E731
    state, y, _ = blocks.over(cut, body, state, inputs)
    return y, state


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(cut, chunk, inputs, state):
    def body(state, x, _):
        last, y = _block(state, x, chunk=chunk)
        return last, y, state

    state, y, states = blocks.over(cut, body, state, inputs)
    return (y, state), (inputs, states)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(cut, chunk, saved, cotangents):
    inputs, states = saved
    dy, dlast = cotangents

    def body(dstate, x, state):
        inputs, dy = x
        return (*jax.vjp(functools.partial(_block, chunk=chunk), state, inputs)[1]((dstate, dy)), None)

    dstate, dinputs, _ = blocks.over(cut, body, dlast, (inputs, dy), states, reverse=True)
    return dinputs, dstate


_attend.defvjp(_forward, _backward)


@exact_for(lambda state, inputs: inputs[:3])
def _block(state, inputs, *, chunk):
    """The chunks of a block: pairs inside each, the state before each, and y = weights v + (q exp(since)) S."""
    q, k, v, g = jax.tree.map(lambda x: _chunks(x, chunk), inputs)  # [B N H C *], g None without decay
    g = None if g is None else jnp.maximum(g, FORGET)
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
    since = jnp.einsum("ti,...i->...t", within, g, precision=HIGHEST)
    after = np.tri(size, k=-1, dtype=np.float32)  # [i s]: i > s
    until = jnp.einsum("is,...i->...s", after, g, precision=HIGHEST)
    between = jnp.einsum("...ti,is->...ts", within * g[..., None, :], after, precision=HIGHEST)
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
    between = jnp.einsum("tsi,...ik->...tsk", select.astype(np.float32), g, precision=HIGHEST)
    decay = jnp.where(np.tri(few, dtype=bool)[..., None], jnp.exp(between), 0.0)
    pairs = jnp.einsum("...tk,...sk,...tsk->...ts", q, k, decay)
    since = jnp.einsum("ti,...ik->...tk", np.tri(few, dtype=np.float32), g, precision=HIGHEST)
    until = jnp.einsum("is,...ik->...sk", np.tri(few, k=-1, dtype=np.float32), g, precision=HIGHEST)
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
