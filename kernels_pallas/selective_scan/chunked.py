"""Chunks side by side: tokens in order within a chunk, states carried between chunks; runs everywhere.

README.md has the derivation. Inside, the state is [N D]: the long axis last, so that vector units are filled, and the
batch and the chunks that run side by side are one axis R = B P, rows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas import blocks, dispatch

CHUNK = 32  # tokens in order; the state is kept once a chunk for the backward pass
ALONE = 1024  # states from which on a CPU chunks go one by one: no pass to find the states between them
# rows x N x D worked on at a time. On a CPU several such arrays stay in a core's cache. None: any that is not a CPU, by
# reasoning and not measured: a step of the loop over tokens costs some launches, which so many elements pay for.
ELEMENTS = {"cpu": 32_768, None: 1 << 20}


def selective_scan_chunked(
    u: Float[Array, "B T D"],
    delta: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    state: Float[Array, "B D N"],
    reset: Bool[Array, "B T"] | None,
    *,
    chunk: int = CHUNK,
    parallel: int | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """y without its skip (float32) and the last state of api.selective_scan. Differentiable in reverse mode.

    Args:
      chunk: tokens a chunk.
      parallel: chunks side by side; None: one on a CPU, unless the states are few, else as many as make about ELEMENTS
        elements of state. XLA's CPU code for a single row is several times slower than for two: a lone row is taken
        as two of half the channels, or as two chunks.

    Memory saved for the backward pass: the inputs and one state a chunk. While it runs, the states of `parallel`
    chunks.
    """
    batch, length, width = u.shape
    looped = dispatch.platform() == "cpu"
    chunk = min(chunk, length)
    chunks = -(-length // chunk)
    halves = 1
    if parallel is None:
        if looped and state.size >= ALONE and (batch > 1 or width % 2 == 0):
            parallel, halves = 1, 2 if batch == 1 else 1
        else:
            parallel = max(2 if batch == 1 else 1, ELEMENTS["cpu" if looped else None] // state.size)
    count = -(-chunks // min(chunks, parallel))
    parallel = -(-chunks // count)  # evened out, so that the last block is not nearly empty
    cut = blocks.Blocks(batch, parallel * chunk, count)
    plan = Plan(cut, parallel, halves)
    starts = None if reset is None else reset[..., None]
    y, state = _scan(plan, (u, delta, B, C, starts), A.T, state.swapaxes(1, 2))
    return y, state.swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class Plan:
    cut: blocks.Blocks
    parallel: int  # P, chunks side by side in a block
    halves: int  # 2: the channels of a lone row as two rows of half as many, else 1

    def split(self, inputs):
        """u, delta, B, C, reset (and dy) of a block, each [B P*C F] -> [C R F]."""
        chunk = inputs[0].shape[1] // self.parallel

        def split(x, channels):
            x = x.reshape(x.shape[0], self.parallel, chunk, -1).transpose(2, 0, 1, 3)
            if self.halves > 1 and not channels:
                return jnp.broadcast_to(x[:, 0], (chunk, self.halves, x.shape[-1]))
            return x.reshape(chunk, x.shape[1] * self.parallel * self.halves, -1)

        return tuple(x if x is None else split(x, n in (0, 1, 5)) for n, x in enumerate(inputs))

    def join(self, x, channels=True):
        """[C R F] -> [B P*C F], undoing split; what is not of channels summed over the halves."""
        chunk, rows = x.shape[:2]
        if self.halves > 1:
            x, rows = x.reshape(chunk, 1, -1) if channels else x.sum(1, keepdims=True), 1
        x = x.reshape(chunk, rows // self.parallel, self.parallel, -1).transpose(1, 2, 0, 3)
        return x.reshape(rows // self.parallel, self.parallel * chunk, -1)

    def fold(self, state):
        """States [B N D] as those of `halves` times as many rows; A [N D] likewise."""
        if self.halves == 1:
            return state
        *_, size, width = state.shape
        return state.reshape(size, self.halves, width // self.halves).swapaxes(0, 1)

    def unfold(self, state):
        return state if self.halves == 1 else state.swapaxes(0, 1).reshape(1, state.shape[1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _scan(plan: Plan, inputs, A, state):
    def body(state, x, _):
        state, y, _ = _forward(plan.fold(A), plan.parallel, plan.fold(state), plan.split(x))
        return plan.unfold(state), plan.join(y), None

    state, y, _ = blocks.over(plan.cut, body, state, inputs)
    return y, state


@functools.partial(jax.jit, static_argnums=0)
def _scan_saving(plan: Plan, inputs, A, state):
    def body(state, x, _):
        state, y, entries = _forward(plan.fold(A), plan.parallel, plan.fold(state), plan.split(x))
        return plan.unfold(state), plan.join(y), entries.reshape(len(x[0]), -1, *entries.shape[1:])

    state, y, entries = blocks.over(plan.cut, body, state, inputs)
    return (y, state), (inputs, A, entries)


@functools.partial(jax.jit, static_argnums=0)
def _scan_backward(plan: Plan, saved, cotangents):
    inputs, A, entries = saved
    dy, dstate = cotangents

    def body(carry, x, entries):
        entries = entries.reshape(-1, *entries.shape[2:])
        carry = jax.tree.map(plan.fold, carry)
        carry, grads = _backward(plan.fold(A), plan.parallel, carry, (plan.split(x), entries))
        made = [plan.join(dx, n < 2).astype(x.dtype) for n, (dx, x) in enumerate(zip(grads, x))]
        return jax.tree.map(plan.unfold, carry), made, None

    carry = dstate, jnp.zeros_like(dstate)
    (dstate, dA), grads, _ = blocks.over(plan.cut, body, carry, (*inputs, dy), entries, reverse=True)
    return (*grads, None), dA.sum(0), dstate  # None: no gradient of a mask


_scan.defvjp(_scan_saving, _scan_backward)


def _outer(states, channels):
    """[R N], [R D] -> [R N D]."""
    return states[:, :, None] * channels[:, None]


def _decay(delta, A, reset):
    decay = jnp.exp(delta[:, None] * A)  # [R N D]
    return decay if reset is None else jnp.where(reset[:, None], 0.0, decay)


def _between_chunks(state, decay, added, parallel, *, reverse=False):
    """The state before every chunk from `state` [B N D]: after a chunk it is decay * before + added, both [R N D]."""

    def split(x):
        return x.reshape(-1, parallel, *x.shape[1:]).swapaxes(0, 1)

    def pass_on(state, chunk):
        decay, added = chunk
        return decay * state + added, state

    last, entries = jax.lax.scan(pass_on, state, (split(decay), split(added)), reverse=reverse)
    return last, entries.swapaxes(0, 1).reshape(decay.shape)


def _forward(A, parallel, state, block):
    """One block: what every chunk adds to the state, the states between chunks, then the outputs.

    Returns the state behind it, y [C R D] and the states before its chunks [R N D].
    """
    u, delta, B, C, reset = block  # [C R D], [C R D], [C R N], [C R N], [C R 1]
    u, delta, B, C = (x.astype(jnp.float32) for x in (u, delta, B, C))
    inputs = (delta, delta * u, B, C, reset)

    def extend(h, inputs):
        delta, v, B, _, reset = inputs
        return _decay(delta, A, reset) * h + _outer(B, v), None

    def token(h, inputs):
        h, _ = extend(h, inputs)
        return h, (h * inputs[3][:, :, None]).sum(1)

    entries = state
    if parallel > 1:
        added, _ = jax.lax.scan(extend, jnp.zeros((u.shape[1], *A.shape), jnp.float32), inputs)
        decay = _decay(delta.sum(0), A, None if reset is None else reset.any(0))
        state, entries = _between_chunks(state, decay, added, parallel)
    last, y = jax.lax.scan(token, entries, inputs)
    return state if parallel > 1 else last, y, entries


def _backward(A, parallel, carry, block):
    """One block in reverse. The adjoint g of the state runs backwards: g_t = C_t dy_t + a_{t+1} g_{t+1}.

    First forwards through the chunks once more, for a_t h_{t-1} at every token and, where several chunks stand side by
    side, for what takes g across a chunk as a whole: the chunk's decay a_1 ... a_C, and what its own outputs add to g,
    sum_t (a_1 ... a_t) C_t dy_t.
    """
    dstate, dA = carry
    (u, delta, B, C, reset, dy), entries = block
    u, delta, B, C = (x.astype(jnp.float32) for x in (u, delta, B, C))
    v = delta * u
    across = parallel > 1

    def forwards(carry, inputs):
        h, *rest = carry
        delta, v, B, C, reset, dy = inputs
        a = _decay(delta, A, reset)
        kept = a * h
        if across:
            decay, added = rest
            rest = [a * decay, added + a * decay * _outer(C, dy)]
        return [kept + _outer(B, v), *rest], kept

    zeros = jnp.zeros_like(entries)
    start = [entries, zeros + 1, zeros] if across else [entries]
    (_, *rest), kept = jax.lax.scan(forwards, start, (delta, v, B, C, reset, dy))
    g = dstate
    if across:
        decay, added = rest
        dstate, g = _between_chunks(dstate, decay, added, parallel, reverse=True)

    def backwards(carry, inputs):
        g, dA = carry
        delta, v, B, C, reset, dy, kept = inputs
        g = g + _outer(C, dy)
        rate = g * kept  # the gradient of delta_t A
        grads = (g * B[:, :, None]).sum(1), (rate * A).sum(1), _over_channels(g, v)
        return (_decay(delta, A, reset) * g, dA + rate * delta[:, None]), grads

    inputs = (delta, v, B, C, reset, dy, kept)
    (before, rates), (dv, through_decay, dB) = jax.lax.scan(backwards, (g, zeros), inputs, reverse=True)
    dC = _over_channels(kept, dy) + B * (v * dy).sum(-1, keepdims=True)  # h_t = a_t h_{t-1} + v_t B_t
    if across:
        rates = rates.reshape(-1, parallel, *A.shape).sum(1)
    else:
        dstate = before
    return (dstate, dA + rates), (delta * dv, u * dv + through_decay, dB, dC)


def _over_channels(x, y):
    """[... N D], [... D] -> [... N]; a product, because XLA's CPU is slow to sum over the last axis."""
    return jnp.einsum("...nd,...d->...n", x, y, precision="highest")
