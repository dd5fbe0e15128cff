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


def pop_losses(module: nnx.Module) -> list[Array]:
    """Those of a module and all within it; they are removed. For what runs a module inside a scan or checkpoint."""
    return jax.tree.leaves(nnx.pop(module, AuxLoss))


def take_losses(module: nnx.Module) -> Float[Array, ""]:
    """Their sum over a module and all within it; they are removed."""
    return sum(pop_losses(module), jnp.zeros((), jnp.float32))
