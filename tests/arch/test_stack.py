"""Blocks in a row: scanned equal to unrolled, loops, remat, residual options, losses of layers."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arch.auxiliary import add_loss, take_losses
from arch.errors import ConfigError
from arch.model import functional
from arch.spec import ImageSpec, InputSpec
from arch.topologies.block import DropPath, Residual
from arch.topologies.stack import repeats
from tests.numerics import rel_rms

SPEC = InputSpec(vocab_size=11, num_classes=11, length=7)
MODEL = {
    "topology": "metaformer",
    "width": 8,
    "depth": 4,
    "layers": ("full", "lin"),
    "channel": "mlp",
    "parts": {
        "full": {"kind": "softmax", "num_heads": 2},
        "lin": {"kind": "linear", "num_heads": 2},
        "mlp": {"kind": "mlp", "hidden": 12},
        "glu": {"kind": "swiglu", "hidden": 6},
    },
    "norm": {"name": "layer"},
    "positions": {"name": "sinusoid"},
    "causal": True,
    "head": {"name": "language_model"},
}


def changed(**fields):
    return {**copy.deepcopy(MODEL), **fields}


@pytest.fixture(scope="module")
def inputs():
    return jax.random.randint(jax.random.key(0), (2, 7), 1, 11)


def as_scanned(params, period=2):
    """The parameters of an unrolled model in the layout of a scanned one."""
    blocks = params["topology"]["blocks"]
    turns = range(len(blocks) // period)
    stacked = {
        str(j): jax.tree.map(lambda *leaves: jnp.stack(leaves), *(blocks[str(period * i + j)] for i in turns))
        for j in range(period)
    }
    return {**params, "topology": {**params["topology"], "blocks": {"0": {"blocks": stacked}}}}


@pytest.mark.parametrize(("remat", "loops"), [("none", 1), ("full", 2)])
def test_scan_is_the_unrolled_model(remat, loops, inputs):
    """Logits, gradients and decoding, from the same weights."""
    plain, scanned = (
        functional(changed(loops=loops), SPEC),
        functional(changed(loops=loops, scan=True), SPEC, remat=remat),
    )
    params = plain.init(jax.random.key(1))
    stacked = as_scanned(params)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(lambda a: a.shape, scanned.abstract())

    def loss(net, params):
        return jnp.sum(jnp.sin(net.apply(params, inputs)))

    want, dwant = jax.jit(jax.value_and_grad(lambda p: loss(plain, p)))(params)
    got, dgot = jax.jit(jax.value_and_grad(lambda p: loss(scanned, p)))(stacked)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(dgot), jax.tree.leaves(as_scanned(dwant)), strict=True):
        assert rel_rms(a, b) < 1e-4
    step = jax.jit(lambda x, state: scanned.module(stacked).step(x, state))
    state, outputs = scanned.module(stacked).init_state(2, 7), []
    for t in range(7):
        y, state = step(inputs[:, t], state)
        outputs.append(y)
    assert rel_rms(jnp.stack(outputs, 1), plain.apply(params, inputs)) < 1e-4


def test_scanned_layers_start_apart_and_drop_apart(inputs):
    net = functional(changed(scan=True, dropout=0.5), SPEC)
    params = net.init(jax.random.key(2))
    kernel = params["topology"]["blocks"]["0"]["blocks"]["0"]["mixer"]["qkv"]["kernel"]
    assert kernel.shape == (2, 8, 24)
    assert rel_rms(kernel[0], kernel[1]) > 0.5
    one, same, other = (net.apply(params, inputs, key=jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert rel_rms(one, other) > 1e-3


def test_repeats():
    a, b = ("a", None), ("b", None)
    assert repeats([a, a, a]) == [(0, 1, 3)]
    assert repeats([a, b, a, b]) == [(0, 2, 2)]
    assert repeats([a, b]) == [(0, 1, 1), (1, 1, 1)]
    assert repeats([a, a, b, b, b]) == [(0, 1, 2), (2, 1, 3)]
    assert repeats([a, b, b, b, a, b, b, b]) == [(0, 4, 2)]
    assert repeats([]) == []


def test_loops_share_weights(inputs):
    """Two turns of one layer are two layers with the same weights, but for dropout, which differs."""
    looped = functional(changed(depth=1, layers=("full",), loops=2), SPEC)
    params = looped.init(jax.random.key(3))
    twice = copy.copy(params)
    block = params["topology"]["blocks"]["0"]
    twice["topology"] = {**params["topology"], "blocks": {"0": block, "1": block}}
    want = functional(changed(depth=2, layers=("full",)), SPEC).apply(twice, inputs)
    np.testing.assert_allclose(looped.apply(params, inputs), want, atol=1e-5)


def test_parallel_block_and_channel_pattern(inputs):
    net = functional(changed(parallel=True, channel=("mlp", "glu")), SPEC)
    model = net.module(net.init(jax.random.key(4)))
    x = jax.random.normal(jax.random.key(5), (2, 7, 8))
    for block, kind in zip(model.topology.blocks, ("MLP", "SwiGLU", "MLP", "SwiGLU"), strict=True):
        assert type(block.channel).__name__ == kind
        h = block.mix.norm(x)
        np.testing.assert_allclose(block(x), x + block.mixer(h) + block.channel(h), atol=1e-5)


class NoNorm(nnx.Module):
    def __call__(self, x):
        return x


def test_residual_scales_and_drop_path():
    x = jax.random.normal(jax.random.key(6), (4000, 3, 2))
    residual = Residual(
        NoNorm(), "pre", 0.0, width=2, layer_scale=0.1, residual_scale=3.0, drop_path=0.25, rngs=nnx.Rngs(0)
    )
    residual.eval()
    np.testing.assert_allclose(residual(x, jnp.sin), 3 * x + 0.1 * jnp.sin(x), rtol=1e-5)
    drop = DropPath(0.25, rngs=nnx.Rngs(0))
    kept = np.asarray(drop(jnp.ones((4000, 3, 2))))
    assert set(np.unique(kept)) == {0.0, np.float32(1 / 0.75)}
    assert (kept == kept[:, :1, :1]).all()  # an example as a whole
    assert abs((kept[:, 0, 0] > 0).mean() - 0.75) < 0.03


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"scan": True, "layers": ("full", "lin"), "depth": 2}, "scan"),
        ({"scan": True, "drop_path": 0.1}, "drop_path"),
        ({"parallel": True, "channel": None}, "parallel"),
        ({"channel": ("mlp", "full")}, "channel"),
        ({"channel": ()}, "channel"),
        ({"embedding": {"name": "patches", "size": 2}}, "embedding.name"),
    ],
)
def test_refusals_name_the_field(fields, path):
    with pytest.raises(ConfigError) as caught:
        functional(changed(**fields), SPEC)
    assert caught.value.path.startswith(path)


class Costly(nnx.Module):
    """A channel mixer that costs the mean of its input, to see its loss come out."""

    def __init__(self, width: int):
        del width

    def __call__(self, x):
        add_loss(self, jnp.square(jnp.sin(x)).mean())
        return 0.5 * x


def test_losses_come_out_of_every_form(inputs, monkeypatch):
    from arch.registry import CHANNEL_MIXERS

    monkeypatch.setitem(CHANNEL_MIXERS._entries, "costly", Costly)
    parts = {**MODEL["parts"], "costly": {"kind": "costly"}}
    forms = {"plain": ({}, "none"), "remat": ({}, "full"), "scan": ({"scan": True}, "dots")}
    found = {}
    for name, (fields, remat) in forms.items():
        net = functional(changed(parts=parts, channel="costly", loops=2, **fields), SPEC, remat=remat)
        if name == "plain":
            params = net.init(jax.random.key(7))
        given = as_scanned(params) if name == "scan" else params
        found[name] = net.apply_with_losses(given, inputs)[1]
    assert abs(float(found["plain"])) > 1e-3
    np.testing.assert_allclose(found["remat"], found["plain"], rtol=1e-5)
    np.testing.assert_allclose(found["scan"], found["plain"], rtol=1e-5)
    module = Costly(3)
    module(jnp.ones(3))
    module(jnp.ones(3))
    np.testing.assert_allclose(take_losses(module), 2 * np.sin(1) ** 2, rtol=1e-6)
    assert float(take_losses(module)) == 0.0


def test_images():
    """Patches in row-major order; a grid mixer sees the grid, a CLS token needs a sequence."""
    spec = ImageSpec(height=6, width=4, channels=3, num_classes=5)
    image = {
        "causal": False,
        "layers": ("pool", "full"),
        "parts": {**MODEL["parts"], "pool": {"kind": "pooling"}},
        "embedding": {"name": "patches", "size": 2},
        "positions": {"name": "learned"},
        "head": {"name": "classifier", "pooling": "mean"},
    }
    x = jax.random.normal(jax.random.key(8), (2, 6, 4, 3))
    net = functional(changed(**image), spec)
    params = net.init(jax.random.key(9))
    assert net.apply(params, x).shape == (2, 5)
    embed = net.module(params).embed
    kernel, bias = params["embed"]["proj"]["kernel"], params["embed"]["proj"]["bias"]
    assert embed.grid == (3, 2)
    patch = x[1, 4:6, 2:4].reshape(-1)
    np.testing.assert_allclose(embed(x)[1, 2, 1], patch @ kernel + bias, atol=1e-5)
    flat = functional(
        changed(
            **{**image, "embedding": {"name": "patches", "size": 2, "flatten": True}, "head": {"name": "classifier"}}
        ),
        spec,
    )
    assert flat.apply(flat.init(jax.random.key(9)), x).shape == (2, 5)
    for fields, path in (
        ({"head": {"name": "classifier"}}, "head.pooling"),
        ({"positions": {"name": "rotary"}}, "positions.name"),
        ({"embedding": {"name": "patches", "size": 4}}, "embedding.size"),
        ({"embedding": {"name": "tokens"}}, "embedding.name"),
    ):
        with pytest.raises(ConfigError) as caught:
            functional(changed(**{**image, **fields}), spec)
        assert caught.value.path == path
