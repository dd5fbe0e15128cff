"""The TPU kernels of linear attention by interpretation, against the reference one token at a time."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.linear_attention.pallas_tpu import linear_attention_tpu
from kernels_pallas.linear_attention.ref import linear_attention_ref
from tests.kernels_pallas.test_linear_attention import by_loops, make_inputs
from tests.numerics import rel_rms

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
DECAYS = [None, "head", "channel"]


def check(arrays, *, mode=True, **options):
    """Outputs and all gradients against the reference, which is given the same rounded inputs in float32."""
    dtype = str(arrays["q"].dtype)

    def run(function, arrays):
        def loss(arrays):
            y, state = function(*(arrays.get(name) for name in ("q", "k", "v", "log_decay", "state")))
            weights = (jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for x in (y, state))
            return sum((x * w).sum() for x, w in zip((y, state), weights)), {"y": y, "state": state}

        (_, outputs), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        return outputs | {"d" + name: value for name, value in grads.items()}

    got = run(lambda *args: linear_attention_tpu(*args, interpret=mode, **options), arrays)
    want = run(linear_attention_ref, {name: x.astype(jnp.float32) for name, x in arrays.items()})
    assert got["y"].dtype == arrays["v"].dtype
    for name in want:
        assert rel_rms(got[name], want[name]) < TOLERANCE[dtype], name


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matches_ref(dtype, decay):
    """Sizes that all differ, a length that does not divide, three chunks of 16 of two heads a step."""
    strength = {"head": 0.3, "channel": 0.3}.get(decay, 0.0)
    check(make_inputs(2, 101, 4, 5, 7, decay=decay, dtype=dtype, strength=strength), chunk=16, step=48, heads=2)


@pytest.mark.parametrize("decay", DECAYS[1:])
def test_strong_decay(decay):
    """exp of a sum over a chunk underflows, and one token forgets by -inf: nothing becomes nan, nothing is lost."""
    arrays = make_inputs(1, 70, 2, 5, 7, decay=decay, strength=30.0)
    arrays["log_decay"] = arrays["log_decay"].at[:, 40:].multiply(1e-3).at[:, jnp.array([20, 45])].set(-jnp.inf)
    options = {"interpret": True, "chunk": 32}
    y, state = linear_attention_tpu(*arrays.values(), **options)
    want_y, want_state = by_loops(**arrays)
    assert rel_rms(y, want_y) < 1e-5
    assert rel_rms(y[:, 45:], want_y[:, 45:]) < 1e-5
    assert rel_rms(state, want_state) < 1e-5
