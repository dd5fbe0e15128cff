"""model.read=pooled: the last layer computes only the token that the head reads, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arch import accounting
from arch.errors import ConfigError
from arch.inspection import build
from arch.model import functional
from arch.spec import InputSpec
from configs import parts

SPEC = InputSpec(vocab_size=11, num_classes=3, length=12)


def inputs():
    x = np.random.default_rng(0).integers(1, 11, (2, 12)).astype(np.int32)
    x[1, 7:] = 0
    return jnp.asarray(x)


def model(mixer, depth=2, positions="learned", **changes):
    config = parts.metaformer(width=16, depth=depth, mixer=mixer, positions=positions, head={"hidden": 8}).to_dict()
    return {**config, **changes}


def logits_and_grads(config, x):
    net = functional(config, SPEC)
    params = net.init(jax.random.key(1))
    weights = jax.random.normal(jax.random.key(2), (2, 3))
    return jax.jit(jax.value_and_grad(lambda p: jnp.sum(weights * net.apply(p, x))))(params)


CASES = {
    "absorbed": model({"kind": "softmax", "num_heads": 2}),
    "bias, grouped heads": model({"kind": "softmax", "num_heads": 4, "kv_heads": 2, "head_dim": 8, "bias": True}),
    "few channels a head": model({"kind": "softmax", "num_heads": 8}, norm_placement="post"),
    "rotary": model({"kind": "softmax", "num_heads": 2}, positions="rotary"),
    "parallel, one layer": model({"kind": "softmax", "num_heads": 2}, depth=1, parallel=True),
    "a mixer without read": model({"kind": "linear", "num_heads": 2}),
}


SLOW = ("few channels a head", "rotary", "parallel, one layer")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES]
)
def test_equals_the_whole_computation(name):
    config, x = CASES[name], inputs()
    want, want_grads = logits_and_grads(config, x)
    got, got_grads = logits_and_grads({**config, "read": "pooled"}, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), got_grads, want_grads)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_read_of_softmax(causal, count):
    entry = {"kind": "softmax", "num_heads": 4, "kv_heads": 2, "head_dim": 16, "bias": True}
    mixer = build(entry, width=16, causal=causal, max_length=10)
    mixer.qkv.bias[...] = jax.random.normal(jax.random.key(3), mixer.qkv.bias.shape)  # nearly zero at first
    x = jax.random.normal(jax.random.key(0), (2, 10, 16))
    keep = jnp.arange(10) < jnp.array([[10], [6]])
    graph, state = nnx.split(mixer)
    got = jax.jit(lambda state: nnx.merge(graph, state).read(x, count, keep=keep))(state)
    np.testing.assert_allclose(got, mixer(x, keep=keep)[:, :count], rtol=1e-5, atol=1e-5)


def test_one_wide_layer_is_no_longer_quadratic():
    config = model({"kind": "softmax", "num_heads": 8, "head_dim": 8}, depth=1, read="pooled")
    spec = [InputSpec(11, 3, length) for length in (256, 512)]
    short, long = (accounting.forward_flops(config, each) for each in spec)
    assert long / short < 2.05
    assert short < accounting.forward_flops({**config, "read": "all"}, spec[0]) / 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": {"name": "classifier", "pooling": "mean"}}, "read: pooled needs a head that reads one token"),
        ({"loops": 2}, "read: looped and scanned layers"),
        ({"scan": True}, "read: looped and scanned layers"),
    ],
)
def test_refusals(changes, message):
    config = model({"kind": "softmax", "num_heads": 2}, read="pooled", **changes)
    with pytest.raises(ConfigError, match=message):
        functional(config, SPEC)
