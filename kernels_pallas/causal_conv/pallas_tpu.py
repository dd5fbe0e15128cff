"""Short causal convolution on TPU (Pallas Mosaic TPU): layout and the gradient rule; README.md."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import mosaic_tpu
from kernels_pallas.causal_conv import tiles
from kernels_pallas.causal_conv.chunked import convolve, visible
from kernels_pallas.causal_conv.pallas_tpu_backward import backward
from kernels_pallas.causal_conv.pallas_tpu_forward import MOST, Plan, forward, halo


def causal_conv_tpu(
    x: Float[Array, "B T D"],
    filter: Float[Array, "W D"],
    bias: Float[Array, " D"] | None,
    past: Float[Array, "B P D"] | None,
    keep: Bool[Array, "B T"] | None,
    segment_ids: Int[Array, "B T"] | None,
    *,
    activation: Literal["silu"] | None,
    chunk: int | None = None,
    width: int | None = None,
    interpret: mosaic_tpu.Interpret | None = None,
) -> tuple[Float[Array, "B T D"]]:
    """(y,) of api.causal_conv in the dtype of x. Saved for the backward pass: the inputs.

    Args:
      chunk, width: tokens and channels a grid step. interpret: as mosaic_tpu.call; None as the context says.

    Raises:
      NotImplementedError: float16, or more than 8 taps.
    """
    mosaic_tpu.refuse_float16("causal_conv", x, past)
    taps, length = filter.shape[0], x.shape[1]
    if taps > MOST:
        raise NotImplementedError(f"causal_conv: {taps} taps; the kernel has at most {MOST}")
    seen = visible(keep, segment_ids, taps)
    rows = tiles.lengths(length, seen is not None, chunk or tiles.CHUNK)
    plan = Plan(
        taps=taps,
        length=length,
        chunk=rows,
        steps=-(-length // rows),
        width=tiles.widths(x.shape[2], width or tiles.WIDTH),
        silu=activation == "silu",
        interpret=mosaic_tpu.interpreted() if interpret is None else interpret,
    )
    return (_arranged(plan, x, filter, bias, past, seen),)


@functools.partial(jax.jit, static_argnums=0)
def _arranged(plan: Plan, x, filter, bias, past, seen):
    """Taps and bias as the rows of one array. A row shorter than one tile is filled up; longer ones never are."""
    table = jnp.zeros((tiles.ROWS, x.shape[2]), jnp.float32).at[: plan.taps].set(filter.astype(jnp.float32))
    if bias is not None:
        table = table.at[MOST].set(bias.astype(jnp.float32))
    past = None if past is None else past.astype(jnp.float32)
    fill = max(0, plan.chunk - x.shape[1])
    y = _conv(plan, jnp.pad(x, [(0, 0), (0, fill), (0, 0)]) if fill else x, table, past, seen)
    return y[:, : plan.length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(plan: Plan, x, table, past, seen):
    return forward(plan, x, table, past, seen)


def _save(plan: Plan, x, table, past, seen):
    return _conv(plan, x, table, past, seen), (x, table, past, seen)


def _backward(plan: Plan, saved, dy):
    x, table, past, seen = saved
    dx, dtable = backward(plan, x, dy, table, None if past is None else halo(past), seen)
    dpast = None
    if past is not None:  # only the first W - 1 tokens read it
        few = min(plan.taps - 1, plan.length)
        head = None if seen is None else [m[:, :few] for m in seen]

        def first_tokens(past):
            act = "silu" if plan.silu else None
            return convolve(x[:, :few], table[: plan.taps], table[MOST], past, head, activation=act)

        (dpast,) = jax.vjp(first_tokens, past)[1](dy[:, :few])
    return dx, dtable, dpast, None


_conv.defvjp(_save, _backward)
