"""Linear attention, RetNet's retention and GLA against flash-linear-attention's naive functions, gradients included."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from arch.mixers.retention import Retention
from kernels_pallas import dispatch
from kernels_pallas.linear_attention import IMPLEMENTATIONS, linear_attention
from tests.numerics import rel_rms
from tests.peers.harness import peer

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def naive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("linear_naive")
    return peer("linear_naive", folder, needs=("torch", "fla", "einops"))


@pytest.mark.parametrize("implementation", sorted(set(IMPLEMENTATIONS) - set(dispatch.KERNELS)))
@pytest.mark.parametrize("name", ["plain", "normalized", "retention", "gla"])
def test_naive_functions(implementation, name, naive):
    """fla scales q by K^-1/2 inside; ours leaves q to the caller. Its divisor has 1e-10 added."""
    given = {"plain": ("q", "k", "v", "state"), "gla": ("q", "k", "v", "log_decay", "state")}.get(name, ("q", "k", "v"))
    heads, width = naive["q"].shape[2:]
    slopes = jnp.asarray(Retention(heads * width, causal=True, num_heads=heads, rngs=nnx.Rngs(0)).log_decay)

    @jax.jit
    def run(inputs):
        inputs = inputs | {"q": inputs["q"] * width**-0.5}
        if name == "normalized":
            inputs |= {"q": jnp.abs(inputs["q"]), "k": jnp.abs(inputs["k"])}
        if name == "retention":
            inputs |= {"log_decay": jnp.broadcast_to(slopes, inputs["q"].shape[:3])}
        return linear_attention(**inputs, normalize=name == "normalized", implementation=implementation)

    (y, last), pull = jax.vjp(run, {n: jnp.asarray(naive[n]) for n in given})
    (grads,) = pull((jnp.asarray(naive["dy"]), jnp.zeros_like(last)))
    assert rel_rms(y, naive[f"{name}/y"]) < 1e-5
    if f"{name}/last" in naive:
        assert rel_rms(last, naive[f"{name}/last"]) < 1e-5
    for n, gradient in grads.items():
        assert rel_rms(gradient, naive[f"{name}/d{n}"]) < 2e-5, n
