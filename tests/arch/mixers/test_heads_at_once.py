"""softmax with heads_at_once: the same sum, lot after lot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arch.errors import ConfigError
from arch.inspection import build
from arch.positions import Rotary
from arch.registry import MIXERS

CASES = {
    "plain": {"num_heads": 6, "head_dim": 4, "heads_at_once": 2},
    "shared keys, bias": {"num_heads": 8, "kv_heads": 4, "head_dim": 4, "bias": True, "heads_at_once": 4},
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equals_all_at_once(name, causal):
    options, rotary = CASES[name], Rotary(4) if name == "plain" else None

    def make(**changes):
        entry = {"kind": "softmax", **options, **changes}
        mixer = MIXERS.build(
            entry, key="kind", width=12, causal=causal, max_length=9, rotary=rotary, rngs=nnx.Rngs(params=0)
        )
        for layer in (mixer.qkv, mixer.out):  # biases are nearly zero at first
            if layer.bias is not None:
                layer.bias[...] = jax.random.normal(jax.random.key(1), layer.bias.shape)
        return mixer

    x = jax.random.normal(jax.random.key(0), (2, 9, 12))
    keep = jnp.arange(9) < jnp.array([[9], [5]])
    weights = jax.random.normal(jax.random.key(2), x.shape) * keep[..., None]

    def value_and_grads(mixer, x):
        graph, state = nnx.split(mixer)

        def loss(state, x):
            return jnp.sum(weights * nnx.merge(graph, state)(x, keep=keep))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, x)

    got, want = value_and_grads(make(), x), value_and_grads(make(heads_at_once=None), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)


def test_lots_are_whole():
    with pytest.raises(ConfigError, match="heads_at_once"):
        build(
            {"kind": "softmax", "num_heads": 6, "head_dim": 4, "heads_at_once": 4}, width=12, causal=False, max_length=8
        )
    with pytest.raises(ConfigError, match="heads_at_once"):  # three query heads share a key head
        build(
            {"kind": "softmax", "num_heads": 6, "head_dim": 4, "kv_heads": 2, "heads_at_once": 2},
            width=12, causal=False, max_length=8,
        )  # fmt: skip


def test_temporaries_shrink():
    def temporaries(at_once):
        mixer = build({"kind": "softmax", "num_heads": 16, "heads_at_once": at_once, "head_dim": 16}, width=16,
                      causal=False, max_length=256)  # fmt: skip
        graph, state = nnx.split(mixer)
        compiled = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, jnp.zeros((4, 256, 16))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(2) < temporaries(None) / 2
