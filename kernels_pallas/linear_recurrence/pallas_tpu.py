"""The TPU kernels as one differentiable function; README.md has the derivation.

Complex numbers are pairs of real arrays, planes (re, im): the TPU's vector units know no others.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact

from kernels_pallas import mosaic_tpu
from kernels_pallas.linear_recurrence import tiles
from kernels_pallas.linear_recurrence.pallas_tpu_backward import backward
from kernels_pallas.linear_recurrence.pallas_tpu_forward import Plan, forward
from kernels_pallas.linear_recurrence.pallas_tpu_rows import Number


def linear_recurrence_tpu(
    a: Inexact[Array, "B T D"] | Inexact[Array, " D"],
    b: Inexact[Array, "B T D"],
    state: Inexact[Array, "B D"],
    reset: Bool[Array, "B T"] | None = None,
    *,
    reverse: bool,
    tile: tuple[int, int] | None = None,
    interpret: mosaic_tpu.Interpret | None = None,
) -> tuple[Inexact[Array, "B T D"], Inexact[Array, "B D"]]:
    """api.linear_recurrence for inputs that all are real or all complex. tile: tokens and channels of one.

    Saved for the backward pass are a, h and the state.
    """
    mosaic_tpu.refuse_float16("linear_recurrence", a, b)
    is_complex = jnp.iscomplexobj(b)
    tokens, channels = tiles.tile(b.shape[1], b.shape[2], 1 + is_complex) if tile is None else tile
    plan = Plan(reverse, tokens, channels, mosaic_tpu.interpreted() if interpret is None else interpret)
    if reset is not None:
        a = jnp.where(reset[:, :, None], 0, jnp.broadcast_to(a, b.shape))
    h, last = run(_planes(a), _planes(b), _planes(state), plan)
    return _joined(h), _joined(last)


def _planes(x: jax.Array) -> Number:
    return (jnp.real(x), jnp.imag(x)) if jnp.iscomplexobj(x) else (x,)


def _joined(x: Number) -> jax.Array:
    return x[0] if len(x) == 1 else jax.lax.complex(*x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def run(a: Number, b: Number, state: Number, plan: Plan) -> tuple[Number, Number]:
    """h and the last state; every array as planes."""
    return forward(a, b, state, plan)


def _saving(a, b, state, plan):
    h, last = forward(a, b, state, plan)
    return (h, last), (a, h, state)


def _backward(plan, saved, cotangents):
    return backward(*saved, *cotangents, plan)


run.defvjp(_saving, _backward)
