"""The denoiser head: patches to pixels, the vector of the time, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arch import accounting
from arch.denoiser import Denoiser, sinusoids, unpatchify
from arch.embeddings import Patches
from arch.errors import ConfigError
from arch.model import functional
from arch.registry import HEADS
from arch.spec import ImageSpec, InputSpec

SPEC = ImageSpec(height=6, width=8, channels=3, num_classes=4)
B = 3


def config(**overrides):
    found = {
        "topology": "metaformer",
        "width": 16,
        "depth": 1,
        "layers": ("mixer",),
        "parts": {"mixer": {"kind": "softmax", "num_heads": 2}, "mlp": {"kind": "mlp", "hidden": 16}},
        "norm": {"name": "layer"},
        "embedding": {"name": "patches", "size": 2},
        "positions": {"name": "learned"},
        "head": {"name": "denoiser", "features": 8},
    }
    return {**found, **overrides}


def images(seed=0):
    return jax.random.normal(jax.random.key(seed), (B, 6, 8, 3))


def perturbed(params, seed=1):
    """Parameters in which nothing is zero any more."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


@pytest.fixture(scope="module", params=["plain", "conditional"])
def net(request):
    head = {"name": "denoiser", "features": 8, "conditional": request.param == "conditional"}
    return functional(config(head=head), SPEC)


@pytest.mark.parametrize("flatten", [True, False])
def test_unpatchify_undoes_the_cut(flatten):
    """With the identity for its matrix the embedding cuts and nothing else."""
    patches = Patches(size=2, flatten=flatten, spec=SPEC, width=12, rngs=nnx.Rngs(0))
    patches.proj.kernel[...], patches.proj.bias[...] = jnp.eye(12), jnp.zeros(12)
    cut = patches(images()).reshape(B, 12, 12)
    np.testing.assert_array_equal(unpatchify(cut, rows=3, columns=4, size=2), images())


def test_sinusoids():
    time, features = np.asarray([0.0, 0.25, 1.0]), 6
    frequency = 10_000.0 ** (-2 * np.arange(3) / 6)
    angle = 1000 * time[:, None] * frequency
    want = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    np.testing.assert_allclose(sinusoids(jnp.asarray(time, jnp.float32), features), want, atol=1e-4)


def test_says_nothing_at_first(net):
    found = net.apply(net.init(jax.random.key(0)), images(), time=jnp.ones(B))
    assert found.shape == (B, 6, 8, 3)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, 0)


def test_time_reaches_every_patch(net):
    params = perturbed(net.init(jax.random.key(0)))
    one, two = (net.apply(params, images(), time=jnp.full(B, t)) for t in (0.2, 0.7))
    assert (jnp.abs(one - two).max(axis=(0, 3)) > 1e-4).all()
    mixed = net.apply(params, images(), time=jnp.asarray([0.2, 0.7, 0.2]))
    np.testing.assert_allclose(mixed[0], one[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mixed[1], two[1], rtol=1e-4, atol=1e-5)


def test_label_reaches_the_network_and_a_negative_one_is_none():
    net = functional(config(head={"name": "denoiser", "features": 8, "conditional": True}), SPEC)
    params = perturbed(net.init(jax.random.key(0)))
    ask = lambda label: net.apply(params, images(), time=jnp.ones(B), label=label)  # noqa: E731
    free = ask(None)
    np.testing.assert_array_equal(ask(jnp.full(B, -1)), free)
    each = [ask(jnp.full(B, c)) for c in range(4)]
    assert all(float(jnp.abs(x - free).max()) > 1e-4 for x in each)
    assert params["head"]["labels"].shape == (5, 16)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_parameter_has_a_gradient(net, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), perturbed(net.init(jax.random.key(0))))
    label = jnp.asarray([0, 1, -1]) if net.config["head"]["conditional"] else None

    def loss(params):
        return jnp.square(net.apply(params, images(), time=jnp.linspace(0.1, 0.9, B), label=label) - 1).sum()

    grads = jax.grad(loss)(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(leaf).all(), path
        assert (leaf != 0).any(), path


def test_costs_are_counted(net):
    account = accounting.account(net.config, SPEC)
    rows = {part.name: part for part in account.parts}
    pixels, features, width = 12, 8, 16
    labels = 5 * width if net.config["head"].get("conditional") else 0
    assert rows["head denoiser"].params == (features + 1 + width + 1) * width + labels + (width + 1) * pixels
    assert rows["head denoiser"].flops >= 2 * 12 * width * pixels + 2 * (features + width) * width
    assert account.state_bytes is None


def refused(match, spec=SPEC, **overrides):
    with pytest.raises(ConfigError, match=match):
        functional(config(**overrides), spec)


def test_refuses_what_it_cannot_be_the_head_of():
    words = InputSpec(vocab_size=9, num_classes=4, length=8)
    refused("denoiser makes images", words, embedding={"name": "tokens"})
    refused("unknown key|features", head={"name": "denoiser", "features": 7})
    refused("causal", causal=True, embedding={"name": "patches", "size": 2, "flatten": True})
    assert "pooling" not in HEADS.options("denoiser")  # so a CLS token cannot be asked for
    embedding = Patches(size=2, spec=SPEC, width=8, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="a token a patch"):
        Denoiser(16, num_classes=4, spec=SPEC, embedding=embedding, embedding_width=8, rngs=nnx.Rngs(0))


def test_refuses_a_call_that_lacks_what_it_needs(net):
    params = net.init(jax.random.key(0))
    with pytest.raises(ConfigError, match="time"):
        net.apply(params, images())
    if not net.config["head"]["conditional"]:
        with pytest.raises(ConfigError, match=r"head\.conditional"):
            net.apply(params, images(), time=jnp.ones(B), label=jnp.zeros(B, jnp.int32))
    other = functional(config(head={"name": "classifier", "pooling": "mean"}), SPEC)
    with pytest.raises(ConfigError, match="denoiser"):
        other.apply(other.init(jax.random.key(0)), images(), time=jnp.ones(B))
