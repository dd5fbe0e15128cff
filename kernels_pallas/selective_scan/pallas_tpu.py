"""The TPU kernels as one differentiable function; README.md has the derivation."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas import mosaic_tpu
from kernels_pallas.selective_scan import tiles
from kernels_pallas.selective_scan.pallas_tpu_backward import backward
from kernels_pallas.selective_scan.pallas_tpu_forward import Plan, forward


def selective_scan_tpu(
    u: Float[Array, "B T D"],
    delta: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    D: Float[Array, " D"] | None,
    state: Float[Array, "B D N"],
    reset: Bool[Array, "B T"] | None,
    *,
    tile: tuple[int, int] | None = None,
    interpret: mosaic_tpu.Interpret | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """y in the dtype of u and the last state of api.selective_scan. tile: tokens and channels of one, multiples of 128.

    Saved for the backward pass are the inputs and one state a tile of time.
    """
    mosaic_tpu.refuse_float16("selective_scan", u, delta, B, C)
    tokens, channels = tiles.tile(u.shape[1], u.shape[2], A.shape[1]) if tile is None else tile
    plan = Plan(tokens, channels, mosaic_tpu.interpreted() if interpret is None else interpret)
    D = jnp.zeros(u.shape[2:], jnp.float32) if D is None else D
    return _scan(u, delta, A, B, C, D, state, reset, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def _scan(u, delta, A, B, C, D, state, reset, plan):
    y, last, _ = forward(u, delta, A, B, C, D, state, reset, plan, False)
    return y, last


def _saving(u, delta, A, B, C, D, state, reset, plan):
    y, last, entries = forward(u, delta, A, B, C, D, state, reset, plan, True)
    return (y, last), (u, delta, A, B, C, D, reset, entries)


def _backward(plan, saved, cotangents):
    return (*backward(*saved, *cotangents, plan), None)  # None: no gradient of a mask


_scan.defvjp(_saving, _backward)
