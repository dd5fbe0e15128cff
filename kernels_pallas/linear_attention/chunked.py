"""Chunkwise parallel form: quadratic inside a chunk, the state carried between chunks; runs everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

CHUNK = 64  # tokens a step without a decay or with one a head
VECTOR_CHUNK = 16  # with a decay a key channel: pairs within a chunk cost C K exponentials a token
FORGET = -1e4  # exp of this is 0 in float32, and sums of it stay finite where -inf would give nan


def linear_attention_chunked(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None,
    state: Float[Array, "B H K V"],
    *,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """y (float32) and the last state of api.linear_attention, before any normalisation.

    Memory saved for the backward pass: the inputs and one state a chunk; the rest is recomputed.
    """
    batch, length, heads, _ = q.shape
    vector = log_decay is not None and log_decay.ndim == 4
    chunk = min(length, chunk or (VECTOR_CHUNK if vector else CHUNK))
    chunks = -(-length // chunk)

    def split(x):  # [B T H *] -> [chunks B H C *], float32, filled up with zeros: k = 0 and no decay change nothing
        x = jnp.pad(x, [(0, 0), (0, chunks * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(batch, chunks, chunk, *x.shape[2:]).astype(jnp.float32)
        return jnp.moveaxis(jnp.swapaxes(x, 2, 3), 1, 0)

    if log_decay is not None:
        log_decay = jnp.maximum(split(log_decay), FORGET)
    body = _plain if log_decay is None else _vector_decay if vector else _scalar_decay
    inputs = (split(q), split(k), split(v), log_decay)
    state, y = jax.lax.scan(jax.checkpoint(body), state, inputs)
    y = jnp.moveaxis(y, 0, 1).swapaxes(2, 3).reshape(batch, chunks * chunk, heads, -1)
    return y[:, :length], state


def _plain(state, inputs):
    """y = q S + tril(q k^T) v;  S' = S + k^T v."""
    q, k, v, _ = inputs  # [B H C *]
    pairs = jnp.tril(jnp.einsum("bhtk,bhsk->bhts", q, k))
    y = jnp.einsum("bhtk,bhkv->bhtv", q, state) + jnp.einsum("bhts,bhsv->bhtv", pairs, v)
    return state + jnp.einsum("bhsk,bhsv->bhkv", k, v), y


def _scalar_decay(state, inputs):
    """As _plain, with the pair (t, s) times exp(g_{s+1} + ... + g_t), summed directly so that nothing cancels."""
    q, k, v, g = inputs  # g [B H C]
    size = g.shape[-1]
    within = jnp.tril(jnp.ones((size, size), jnp.float32))  # [t i]: i <= t
    since_start = jnp.einsum("ti,bhi->bht", within, g)
    to_end = jnp.einsum("is,bhi->bhs", within - jnp.eye(size), g)  # sum of g over i > s
    between = jnp.einsum("bhti,is->bhts", within * g[:, :, None, :], jnp.tril(within, -1))  # sum of g over s < i <= t
    pairs = jnp.einsum("bhtk,bhsk->bhts", q, k) * jnp.where(within > 0, jnp.exp(between), 0.0)
    y = jnp.exp(since_start)[..., None] * jnp.einsum("bhtk,bhkv->bhtv", q, state)
    y += jnp.einsum("bhts,bhsv->bhtv", pairs, v)
    carried = jnp.exp(since_start[..., -1])[..., None, None] * state
    return carried + jnp.einsum("bhsk,bhsv->bhkv", k * jnp.exp(to_end)[..., None], v), y


def _vector_decay(state, inputs):
    """As _scalar_decay, with a decay a key channel: the pair needs a sum over channels, made directly [C C K]."""
    q, k, v, g = inputs  # g [B H C K]
    size = g.shape[-2]
    within = jnp.tril(jnp.ones((size, size), jnp.float32))
    since_start = jnp.einsum("ti,bhik->bhtk", within, g)
    to_end = jnp.einsum("is,bhik->bhsk", within - jnp.eye(size), g)
    order = np.arange(size)
    select = (order[None, None] > order[None, :, None]) & (order[None, None] <= order[:, None, None])  # [t s i]
    between = jnp.einsum("tsi,bhik->bhtsk", jnp.asarray(select, jnp.float32), g)
    decay = jnp.where(within[..., None] > 0, jnp.exp(between), 0.0)
    pairs = jnp.einsum("bhtk,bhsk,bhtsk->bhts", q, k, decay)
    y = jnp.einsum("bhtk,bhkv->bhtv", q * jnp.exp(since_start), state) + jnp.einsum("bhts,bhsv->bhtv", pairs, v)
    carried = jnp.exp(since_start[..., -1, :])[..., None] * state
    return carried + jnp.einsum("bhsk,bhsv->bhkv", k * jnp.exp(to_end), v), y
