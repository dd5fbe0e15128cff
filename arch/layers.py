"""The few layers that mixers and topologies share, with the initialisation of the Long Range Arena release."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import nn
from jaxtyping import Array, Float

XAVIER = nn.initializers.xavier_uniform()
NEARLY_ZERO = nn.initializers.normal(1e-6)


def dense(inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
    """x W (+ b): Xavier-uniform kernel, bias N(0, 1e-6)."""
    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=XAVIER, bias_init=NEARLY_ZERO, rngs=rngs)


class Exact(nnx.Module):
    """Parameters that stay float32 when `cast` turns the others to bf16, each under its own name.

    For the frequencies, decays and step sizes of recurrences, where a row's length multiplies the error of rounding.
    Held as the attribute `exact` of a mixer, by which `cast` knows them.
    """

    def __init__(self, **values: jax.Array):
        self.names = tuple(values)
        for name, value in values.items():
            setattr(self, name, nnx.Param(value))

    def read(self) -> dict[str, jax.Array]:
        return {name: getattr(self, name)[...].astype(jnp.float32) for name in self.names}


def cast(params: Any, dtype: Any) -> Any:
    """Parameters (nested dicts or an nnx.State) in another dtype, all but those of an Exact."""

    def one(path: tuple[Any, ...], p: jax.Array) -> jax.Array:
        return p if any(getattr(key, "key", None) == "exact" for key in path) else p.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params)


class StarReLU(nnx.Module):
    """scale relu(x)^2 + bias, two learnt numbers, 1 and 0 at first as in the released code.

    Source: Yu et al. 2022, arXiv:2210.13452.
    """

    def __init__(self) -> None:
        self.scale, self.bias = nnx.Param(jnp.ones(())), nnx.Param(jnp.zeros(()))

    def __call__(self, x: Float[Array, "*A D"]) -> Float[Array, "*A D"]:
        scale, bias = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
        return (scale * jnp.square(nnx.relu(x.astype(jnp.float32))) + bias).astype(x.dtype)


class Dropout(nnx.Module):
    """Zeroes a share `rate` of the elements and scales the rest by 1 / (1 - rate); identity when deterministic.

    With rate 0 it holds no random state, so that a model without dropout asks for no random numbers.
    """

    def __init__(self, rate: float, *, rngs: nnx.Rngs):
        self.inner = nnx.Dropout(rate, rngs=rngs) if rate else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return x if self.inner is None else self.inner(x)
