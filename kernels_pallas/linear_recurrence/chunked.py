"""Parallel scan within chunks of tokens, the state carried between them: for devices where a step is dear."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact

from kernels_pallas.linear_recurrence.adjoint import with_adjoint

CHUNK = 256  # tokens; log2 of it is the depth of the parallel scan


def linear_recurrence_chunked(
    a: Inexact[Array, "B T D"] | Inexact[Array, " D"],
    b: Inexact[Array, "B T D"],
    state: Inexact[Array, "B D"],
    reset: Bool[Array, "B T"] | None,
    *,
    reverse: bool,
) -> tuple[Inexact[Array, "B T D"], Inexact[Array, "B D"]]:
    """api.linear_recurrence for inputs that all are real or all complex."""
    return _run(a, b, state, reset, reverse)


def _core(a, b, state, reset, reverse, after, dtype):
    batch, length, width = b.shape
    chunk = min(length, CHUNK)
    chunks = -(-length // chunk)
    spare = chunks * chunk - length
    fill = (spare, 0) if reverse else (0, spare)  # behind the last token read: dropped from h, and the state passes

    def split(x, value):  # [B T *] -> [chunks B C *], in the order of reading
        x = jnp.pad(x, [(0, 0), fill] + [(0, 0)] * (x.ndim - 2), constant_values=value)
        x = jnp.moveaxis(x.reshape(batch, chunks, chunk, *x.shape[2:]), 1, 0)
        return jnp.flip(x, (0, 2)) if reverse else x

    def body(state, inputs):
        a_chunk, b, reset, present = inputs
        a_chunk = (jnp.broadcast_to(a, b.shape) if a_chunk is None else a_chunk).astype(state.dtype)
        if reset is not None:
            a_chunk = jnp.where(reset[:, :, None], 0, a_chunk)
        a_chunk = jnp.where(present[:, :, None], a_chunk, 1)
        reach = jnp.concatenate([jnp.ones_like(a_chunk[:, :1]), a_chunk[:, :-1]], 1) if after else a_chunk
        b = b.astype(state.dtype)
        b = b.at[:, 0].add(reach[:, 0] * state)
        _, h = jax.lax.associative_scan(_combine, (reach, b), axis=1)
        return (a_chunk[:, -1] * h[:, -1] if after else h[:, -1]), h.astype(dtype)

    present = split(jnp.ones((batch, length), bool), False)
    inputs = (
        None if a.ndim == 1 else split(a, 0),
        split(b, 0),
        None if reset is None else split(reset, False),
        present,
    )
    state, h = jax.lax.scan(body, state, inputs)
    h = jnp.moveaxis(jnp.flip(h, (0, 2)) if reverse else h, 0, 1).reshape(batch, chunks * chunk, width)
    return (h[:, spare:] if reverse else h[:, :length]), state


def _combine(first, second):
    """Two stretches of tokens as one: h = a2 (a1 h + b1) + b2."""
    return second[0] * first[0], second[0] * first[1] + second[1]


_run = with_adjoint(_core)
