"""The TPU kernels of the delta rule by interpretation, against the reference one token at a time."""

import functools

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.delta_rule.pallas_tpu import delta_rule_tpu
from kernels_pallas.delta_rule.ref import delta_rule_ref
from tests.kernels_pallas.test_delta_rule import make_inputs
from tests.numerics import rel_rms

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


@functools.partial(jax.jit, static_argnums=0)
def forward_and_grads(function, arrays):
    def loss(arrays):
        y, state = function(*(arrays.get(name) for name in ("q", "k", "v", "beta", "log_decay", "state")))
        weights = (jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for x in (y, state))
        return sum((x * w).sum() for x, w in zip((y, state), weights)), {"y": y, "state": state}

    (_, outputs), grads = jax.value_and_grad(loss, has_aux=True)(arrays)
    return outputs | {"d" + name: value for name, value in grads.items()}


def check(arrays, **options):
    """Outputs and all gradients against the reference, which is given the same rounded inputs in float32."""
    dtype = str(arrays["q"].dtype)
    got = forward_and_grads(functools.partial(delta_rule_tpu, interpret=True, **options), arrays)
    want = forward_and_grads(delta_rule_ref, {name: x.astype(jnp.float32) for name, x in arrays.items()})
    assert got["y"].dtype == arrays["v"].dtype
    for name in want:
        assert rel_rms(got[name], want[name]) < TOLERANCE[dtype], name


@pytest.mark.parametrize("decay", [None, 0.1, 30.0])  # none, weak, and products over a chunk below 1e-30
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matches_ref(dtype, decay):
    """Sizes that all differ, a length that does not divide, two chunks of two heads a step."""
    check(make_inputs(2, 101, 4, 5, 7, decay=decay, dtype=dtype), chunk=16, units=8)
