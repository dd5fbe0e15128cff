"""Chunkwise parallel form (WY representation, UT transform); runs everywhere. README.md has the derivation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels_pallas import blocks, dispatch
from kernels_pallas.precision import HIGHEST, exact_for

# By platform; None: any that is not a CPU, by reasoning and not measured (linear_attention/chunked.py).
CHUNK = {"cpu": 64, None: 64}  # tokens without a decay, a power of two
DECAY_CHUNK = {"cpu": 32, None: 64}  # with one, where the pairs of a chunk cost more
BLOCK = {"cpu": 256, None: 8192}  # tokens a step, over all rows: on a CPU 512 took 1.1 times as long at K 128
BASE = 8  # rows of the blocks that _inverse starts from
FORGET = -1e4  # exp of this is 0 in float32, and sums of it stay finite where -inf would give nan


def delta_rule_chunked(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"] | None,
    state: Float[Array, "B H K V"],
    *,
    chunk: int | None = None,
    block: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """y (float32) and the last state of api.delta_rule.

    Memory saved for the backward pass: the inputs and one state a block; the rest is recomputed.
    """
    batch, length, _, _ = q.shape
    platform = "cpu" if dispatch.platform() == "cpu" else None
    chunk = min(chunk or (CHUNK if log_decay is None else DECAY_CHUNK)[platform], 1 << (length - 1).bit_length())
    cut = blocks.cut(batch, length, block or BLOCK[platform], chunk, platform == "cpu")
    return _delta(cut, chunk, {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay}, state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
@functools.partial(jax.jit, static_argnums=(0, 1))
def _delta(cut, chunk, inputs, state):
    body = lambda state, x, _: (*_block(chunk, state, x), None)  # noqa: E731
    state, y, _ = blocks.over(cut, body, state, inputs)
    return y, state


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(cut, chunk, inputs, state):
    def body(state, x, _):
        last, y = _block(chunk, state, x)
        return last, y, state

    state, y, states = blocks.over(cut, body, state, inputs)
    return (y, state), (inputs, states)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(cut, chunk, saved, cotangents):
    inputs, states = saved
    dy, dlast = cotangents

    def body(dstate, x, state):
        inputs, dy = x
        return (*_block_backward(chunk, state, inputs, dy, dstate), None)

    dstate, dinputs, _ = blocks.over(cut, body, dlast, (inputs, dy), states, reverse=True)
    return dinputs, dstate


_delta.defvjp(_forward, _backward)


@exact_for(lambda chunk, state, inputs: (inputs["q"], inputs["k"], inputs["v"]))
def _block(chunk, state, inputs):
    """The chunks of a block: their writes from the state before each, then what they read."""
    x = _split(chunk, inputs)
    decay = _decay(x["log_decay"])
    last, (states, updates) = jax.lax.scan(_write, state, _transform(x["k"], x["v"], x["beta"], decay))
    return last, _join(_read(x["q"], x["k"], decay, states, updates))


@exact_for(lambda chunk, state, inputs, *_: (inputs["q"], inputs["k"], inputs["v"]))
def _block_backward(chunk, state, inputs, dy, dlast):
    """The gradients of the state before the block and of its inputs; the chunks' states are made again."""
    x, pull_split = jax.vjp(functools.partial(_split, chunk), inputs)
    decay, pull_decay = jax.vjp(_decay, x["log_decay"])
    (erase, values, keys, kept), pull_transform = jax.vjp(_transform, x["k"], x["v"], x["beta"], decay)
    _, (states, updates) = jax.lax.scan(_write, state, (erase, values, keys, kept))
    _, pull_read = jax.vjp(_read, x["q"], x["k"], decay, states, updates)
    dq, dk, ddecay, dstates, dupdates = pull_read(_split(chunk, {"y": dy})["y"])

    def back(dstate, given):  # the transpose of _write; dstate belongs to the state behind the chunk
        erase, keys, kept, dbefore, dupdate = given
        dupdate = dupdate + keys @ dstate
        before = kept * dstate + dbefore - jnp.swapaxes(erase, -1, -2) @ dupdate
        return before, (dstate, dupdate)

    given = (erase, keys, kept, dstates, dupdates)
    dstate, (dafter, dupdates) = jax.lax.scan(back, dlast, given, reverse=True)
    dtransform = (
        -dupdates @ jnp.swapaxes(states, -1, -2),
        dupdates,
        updates @ jnp.swapaxes(dafter, -1, -2),
        jnp.sum(states * dafter, (-1, -2), keepdims=True),
    )
    dk_too, dv, dbeta, ddecay_too = pull_transform(dtransform)
    (dlog_decay,) = pull_decay(jax.tree.map(jnp.add, ddecay, ddecay_too))
    (dinputs,) = pull_split({"q": dq, "k": dk + dk_too, "v": dv, "beta": dbeta, "log_decay": dlog_decay})
    return dstate, dinputs


def _split(chunk, inputs):
    """[B chunks*C H *] -> [chunks B H C *], float32."""

    def split(x):
        x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).astype(jnp.float32)
        return jnp.moveaxis(jnp.swapaxes(x, 2, 3), 1, 0)

    return jax.tree.map(split, inputs)


def _join(y):
    y = jnp.moveaxis(y, 0, 1).swapaxes(2, 3)
    return y.reshape(y.shape[0], -1, *y.shape[3:])


def _decay(g):
    """For g [* C]: exp of the sum of g over s < i <= t (0 for s > t), over i <= t, and over i > s.

    [* C C], [* C 1], [* C 1]; each sum is made directly, so that nothing cancels. None stays None: no decay.
    """
    if g is None:
        return None
    g = jnp.maximum(g, FORGET)
    size = g.shape[-1]
    within = jnp.tril(jnp.ones((size, size), jnp.float32))  # [t i]: i <= t
    since_start = jnp.einsum("ti,...i->...t", within, g, precision=HIGHEST)
    to_end = jnp.einsum("is,...i->...s", within - jnp.eye(size), g, precision=HIGHEST)
    between = jnp.einsum("...ti,is->...ts", within * g[..., None, :], jnp.tril(within, -1), precision=HIGHEST)
    pairs = jnp.where(within > 0, jnp.exp(between), 0.0)
    return pairs, jnp.exp(since_start)[..., None], jnp.exp(to_end)[..., None]


def _transform(k, v, beta, decay):
    """A chunk's writes in terms of the state before it: U = values - erase S,  S' = kept S + keys^T U."""
    pairs, since_start, to_end = (1.0, jnp.ones((*k.shape[:-1], 1)), 1.0) if decay is None else decay
    beta = beta[..., None]
    erase, values = _solve(_among(k, beta, pairs), (beta * since_start * k, beta * v))
    return erase, values, to_end * k, since_start[..., -1:, :]


def _among(k, beta, pairs):
    """[* t s]: what write s adds to the read of k_t, times beta_t [* C 1]."""
    return jnp.tril(beta * (k @ jnp.swapaxes(k, -1, -2)) * pairs, -1)


def _write(state, given):
    """One chunk of the recurrence; keeps the state before it and its updates U."""
    erase, values, keys, kept = given
    update = values - erase @ state
    return kept * state + jnp.swapaxes(keys, -1, -2) @ update, (state, update)


def _read(q, k, decay, states, updates):
    """y_t = S_t^T q_t, from the state before the chunk and the writes up to t."""
    pairs, since_start = (1.0, 1.0) if decay is None else decay[:2]
    return (since_start * q) @ states + jnp.tril(q @ jnp.swapaxes(k, -1, -2) * pairs) @ updates


@jax.custom_vjp
def _solve(a, sides):
    """(I + a)^-1 b for strictly lower triangular a [* C C] and each b of `sides`."""
    return _solve_forward(a, sides)[0]


def _solve_forward(a, sides):
    inverse = _inverse(a)
    found = tuple(inverse @ b for b in sides)
    return found, (inverse, found)


def _solve_backward(saved, cotangents):
    inverse, found = saved
    dsides = tuple(jnp.swapaxes(inverse, -1, -2) @ dx for dx in cotangents)
    da = sum(db @ jnp.swapaxes(x, -1, -2) for db, x in zip(dsides, found))
    return -jnp.tril(da, -1), dsides


_solve.defvjp(_solve_forward, _solve_backward)


def _inverse(a):
    """(I + a)^-1 for strictly lower triangular a [* C C], by halves:

    [A 0; B D]^-1 = [A^-1 0; -D^-1 B A^-1 D^-1], first for all blocks of BASE rows at once by masks, then for blocks
    of twice the size, and so on. Each part is a product of two entries of the result, which is bounded; the powers of a
    in the series I - a + a^2 - ... are not, and cancel.
    """
    size = a.shape[-1]
    rows = min(BASE, size)
    blocks = a.reshape(*a.shape[:-2], size // rows, rows, size // rows, rows)
    a_diagonal = jnp.stack([blocks[..., i, :, i, :] for i in range(size // rows)], -3)  # [* n rows rows]
    inverse = jnp.eye(rows) - jnp.where(_below(rows, 1), a_diagonal, 0.0)
    half = 2
    while half < rows:
        inverse = inverse - _dot(inverse, _dot(jnp.where(_below(rows, half), a_diagonal, 0.0), inverse))
        half *= 2
    while rows < size:
        blocks = a.reshape(*a.shape[:-2], size // rows, rows, size // rows, rows)
        below = jnp.stack([blocks[..., i + 1, :, i, :] for i in range(0, size // rows, 2)], -3)
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -_dot(second, _dot(below, first))
        top = jnp.concatenate([first, jnp.zeros_like(first)], -1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, second], -1)], -2)
        rows *= 2
    return inverse[..., 0, :, :]


def _below(size, half):
    """Places [size size] below the diagonal blocks of `half` rows, within those of twice that."""
    index = np.arange(size) // half
    return (index[:, None] == index[None, :] + 1) & (index[None, :] % 2 == 0)


def _dot(a, b):
    return jnp.matmul(a, b, precision=HIGHEST)
