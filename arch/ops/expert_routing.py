"""Rows of tokens to the places of experts and back, by gathering alone: nothing of size tokens x experts x places.

An expert takes C tokens from a row; its places there are numbered expert x C + c. Letters: E experts, k experts a
token, C places of an expert, P = E C places of a row.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def assign(
    experts: Int[Array, "B T k"], keep: Bool[Array, "B T"], *, num_experts: int, places: int
) -> tuple[Int[Array, "B T k"], Int[Array, "B P"]]:
    """The place of every choice, and the choice at every place.

    The choices of a row are numbered t k + i, i the rank of the expert among the token's k different ones. Places are
    given in the order of the tokens, so that no token's place depends on a later one. A choice without a place, of a
    token that is padding or of an expert that is full, has place P; a place that is free has choice T k.
    """
    batch, length, k = experts.shape
    chosen = jax.nn.one_hot(experts, num_experts, dtype=jnp.int32).sum(axis=2) * keep[..., None]  # [B T E]
    before = jnp.cumsum(chosen, axis=1) - chosen
    order = jnp.take_along_axis(before, experts, axis=-1)
    free = num_experts * places
    place = jnp.where(keep[..., None] & (order < places), experts * places + order, free)
    numbers = jnp.arange(length * k, dtype=jnp.int32)

    def invert(place: Int[Array, " n"]) -> Int[Array, " P"]:
        return jnp.full((free,), length * k, jnp.int32).at[place].set(numbers, mode="drop", unique_indices=True)

    return place, jax.vmap(invert)(place.reshape(batch, length * k))


def _rows(x: Float[Array, "B N *D"], index: Int[Array, "B *M"]) -> Array:
    """[B *M *D]: x at the index along N, row by row; 0 where the index is N or more."""
    return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))(x, index)


@jax.custom_vjp
def dispatch(x: Float[Array, "B T D"], place: Int[Array, "B T k"], choice: Int[Array, "B P"]) -> Float[Array, "B P D"]:
    """The token of every place; 0 where it is free."""
    return _rows(x, choice // place.shape[-1])


def _dispatch_backward(place: Array, dy: Array) -> tuple[Array, None, None]:
    return _rows(dy, place).sum(axis=2), None, None  # a gather too, where the transpose would scatter


dispatch.defvjp(lambda x, place, choice: (dispatch(x, place, choice), place), _dispatch_backward)


@jax.custom_vjp
def combine(
    y: Float[Array, "B P D"], gates: Float[Array, "B T k"], place: Int[Array, "B T k"], choice: Int[Array, "B P"]
) -> Float[Array, "B T D"]:
    """sum_i gates[t, i] y[place[t, i]], in float32 and then the dtype of y; 0 for a token without a place."""
    return jnp.einsum("btkd,btk->btd", _rows(y, place), gates, preferred_element_type=jnp.float32).astype(y.dtype)


def _combine_backward(saved: tuple[Array, ...], dout: Array) -> tuple[Any, ...]:
    y, gates, place, choice = saved
    dgates = jnp.einsum("btkd,btd->btk", _rows(y, place), dout, preferred_element_type=jnp.float32)
    weight = _rows(gates.reshape(gates.shape[0], -1), choice)
    dy = weight[..., None] * _rows(dout, choice // place.shape[-1])
    return dy.astype(y.dtype), dgates.astype(gates.dtype), None, None


combine.defvjp(lambda *args: (combine(*args), args), _combine_backward)
