"""Losses that a layer adds to the task's: the balance of a mixture of experts, say."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float


class AuxLoss(nnx.Variable):
    """A scalar, float32, already weighted; lives from a module's call to `take_losses`."""


def add_loss(module: Any, value: ArrayLike) -> None:
    """Adds to the losses of this call. A module that runs several times adds up."""
    held = getattr(module, "aux_loss", None)
    value = jnp.asarray(value, jnp.float32)
    module.aux_loss = AuxLoss(value if held is None else held[...] + value)


def take_losses(module: nnx.Module) -> Float[Array, ""]:
    """Their sum over a module and all within it; they are removed."""
    return sum(jax.tree.leaves(nnx.pop(module, AuxLoss)), jnp.zeros((), jnp.float32))
