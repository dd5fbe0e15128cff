"""What the tests of the GPU kernels share: interpretation where jax has it, and lowering without a GPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="this jax cannot interpret GPU kernels; jax 0.12 can"
)
MESH = AbstractMesh((1,), ("data",), abstract_device=AbstractDevice("NVIDIA H200", 132, "cuda"))


def lowered(function, *args) -> str:
    """The text of the module for an H200 that is not there."""
    with jax.sharding.use_abstract_mesh(MESH):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def grad_of(function):
    """The gradients of all floating arguments, from the sum of all results."""

    def loss(*args):
        return sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(function(*args)))

    return lambda *args: jax.grad(loss, argnums=tuple(n for n, x in enumerate(args) if x is not None))(*args)


def shapes(batch, length, heads, keys, values, *, decay=None, dtype="bfloat16"):
    """Arguments of linear_attention."""
    rows = lambda *more: jax.ShapeDtypeStruct((batch, length, heads, *more), dtype)  # noqa: E731
    gates = {None: None, "head": rows(), "channel": rows(keys)}[decay]
    state = jax.ShapeDtypeStruct((batch, heads, keys, values), jnp.float32)
    return rows(keys), rows(keys), rows(values), gates, state
