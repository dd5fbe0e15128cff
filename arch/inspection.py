"""What a token mixer does to a row and what it costs, without a model around it."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

import arch.mixers  # noqa: F401  fills the registry
from arch import flops
from arch.registry import MIXERS
from arch.rng import streams
from kernels_pallas import dispatch


@dataclass(frozen=True)
class MixerCost:
    """For one row of `length` tokens; bytes in float32."""

    params: int
    flops: float  # forward
    train_flops: float  # forward and backward, recomputation included
    state_bytes: int | None  # decode state with room for `length` tokens; None in the bidirectional mode
    growth: float  # forward FLOPs of twice the length by those of the length: 2 is linear, 4 quadratic


def build(entry: Mapping[str, Any], *, width: int, causal: bool, max_length: int, seed: int = 0) -> Any:
    """The mixer of a config entry {"kind": name, ...}."""
    return MIXERS.build(
        entry, key="kind", width=width, causal=causal, max_length=max_length, rngs=streams(params=seed, dropout=seed)
    )


@dispatch.target("cpu")  # the XLA forms are counted, whatever device this is made on or for
def cost(entry: Mapping[str, Any], *, width: int, length: int, causal: bool) -> MixerCost:
    """Counted on shapes; nothing is compiled."""

    def counted(length: int, train: bool) -> tuple[Any, float]:
        make = functools.partial(build, entry, width=width, causal=causal, max_length=length)
        mixer = nnx.eval_shape(make)
        mixer.eval()
        parts: Any = nnx.split(mixer, nnx.Param, ...)
        graph, params, rest = parts
        rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if _is_number(leaf) else leaf, rest)

        def forward(params: Any, x: Array) -> Array:
            return nnx.merge(graph, params, rest)(x)

        def loss(params: Any, x: Array) -> Array:
            return jnp.sum(forward(params, x))

        x = jax.ShapeDtypeStruct((1, length, width), jnp.float32)
        function = jax.grad(loss, argnums=(0, 1)) if train else forward
        return mixer, flops.count(function, params, x).flops

    mixer, forward = counted(length, False)
    leaves = jax.tree.leaves(nnx.state(mixer, nnx.Param))
    state = jax.eval_shape(lambda: mixer.init_state(1, length)) if causal else None
    return MixerCost(
        params=sum(math.prod(leaf.shape) for leaf in leaves),
        flops=forward,
        train_flops=counted(length, True)[1],
        state_bytes=None if state is None else sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state)),
        growth=counted(2 * length, False)[1] / forward if forward else 0.0,
    )


def _is_number(leaf: Any) -> bool:
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def mixing_matrix(mixer: Any, x: Float[Array, "T D"], keep: Bool[Array, " T"] | None = None) -> Float[Array, "T S"]:
    """How much token s goes into output t.

    A mixer with `weights`: their absolute value, the mean over heads. Any other: the Frobenius norm of the Jacobian
    block dy_t / dx_s. The two are not on one scale.
    """
    keep = None if keep is None else keep[None]
    if hasattr(mixer, "weights"):
        return jnp.abs(mixer.weights(x[None], keep=keep)[0]).mean(axis=0)

    def read_by(t: Array) -> Array:
        jacobian = jax.jacrev(lambda x: mixer(x[None], keep=keep)[0, t])(x)  # [D S D]
        return jnp.sqrt(jnp.sum(jnp.square(jacobian.astype(jnp.float32)), axis=(0, 2)))

    return jax.lax.map(read_by, jnp.arange(x.shape[0]))  # a row at a time: the whole is (T D)^2 numbers
