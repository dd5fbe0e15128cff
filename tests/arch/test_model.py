"""Model, topology, heads and positions: equations, patterns, functional form, decoding."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arch.channel_mixers import GEGLU, MLP, SwiGLU
from arch.errors import ConfigError
from arch.heads import Classifier
from arch.model import functional
from arch.norms import RMS, Layer, Scale
from arch.positions import Rotary, Sinusoid
from arch.spec import InputSpec
from arch.topologies.metaformer import pattern
from tests.numerics import rel_rms

SPEC = InputSpec(vocab_size=11, num_classes=5, length=9)
MODEL = {
    "topology": "metaformer",
    "width": 12,
    "depth": 3,
    "layers": ("pool", "full"),
    "channel": "mlp",
    "parts": {"pool": {"kind": "pooling"}, "full": {"kind": "softmax", "num_heads": 3}, "mlp": {"kind": "mlp"}},
    "norm": {"name": "layer"},
    "positions": {"name": "sinusoid"},
    "head": {"name": "classifier", "pooling": "cls", "hidden": 7},
    "dropout": 0.25,
}
LANGUAGE = {"causal": True, "head": {"name": "language_model"}, "dropout": 0.0}


def changed(**fields):
    return {**copy.deepcopy(MODEL), **fields}


@pytest.fixture(scope="module")
def inputs():
    x = jax.random.randint(jax.random.key(0), (4, 9), 1, 11)
    return jnp.where(jnp.arange(9) < jnp.array([[9], [4], [1], [0]]), x, 0)


@pytest.fixture(scope="module")
def net():
    return functional(MODEL, SPEC)


@pytest.fixture(scope="module")
def params(net):
    return net.init(jax.random.key(1))


def test_parameters_are_plain_dicts_with_readable_paths(net, params):
    paths = {
        jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(params)
    }
    assert "topology/blocks/1/mixer/qkv/kernel" in paths
    assert "embed/embedding" in paths
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda a: a.shape, net.abstract())
    assert type(params["topology"]["blocks"]) is dict


def test_padding_reaches_no_logit(net, params, inputs):
    """keep defaults to inputs != 0; other ids on the padding change nothing, and a row of padding alone is finite."""
    keep = inputs != 0
    a = net.apply(params, inputs)
    b = net.apply(params, jnp.where(keep, inputs, 5), keep)
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert a.shape == (4, 5)
    assert a.dtype == jnp.float32
    assert bool(jnp.isfinite(a).all())


def test_dropout_follows_the_key(net, params, inputs):
    one, same, other = (net.apply(params, inputs, key=jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert float(jnp.abs(one - other).max()) > 1e-3
    np.testing.assert_array_equal(net.apply(params, inputs), net.apply(params, inputs))


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_number(remat, net, params, inputs):
    def gradient(net):
        grads = jax.grad(lambda p: jnp.sum(net.apply(p, inputs, key=jax.random.key(3)) ** 2))(params)
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grads)])

    assert (
        rel_rms(gradient(functional(MODEL, SPEC, remat=remat)), gradient(net)) < 1e-5
    )  # other fusions, other roundings


def test_remat_recomputes(net, params, inputs):
    """The compiled gradient keeps less: counted on what the forward pass hands to the backward pass."""

    def saved(net):
        def residuals(p):
            return jax.tree.leaves(jax.vjp(lambda p: net.apply(p, inputs).sum(), p)[1])

        return sum(leaf.size for leaf in jax.eval_shape(residuals, params))

    none, dots, full = (saved(functional(changed(dropout=0.0), SPEC, remat=r)) for r in ("none", "dots", "full"))
    assert full < dots < none


def test_bf16_stays_bf16(params, inputs):
    """No layer widens activations: every block's output has the dtype of the parameters."""
    cast = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    model = functional(MODEL, SPEC).module(cast)
    x = model.positions(model.embed(inputs))
    assert x.dtype == jnp.bfloat16
    for block in model.topology.blocks:
        x = block(x, keep=inputs != 0)
        assert x.dtype == jnp.bfloat16
    assert model.topology.norm(x).dtype == jnp.bfloat16


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_block_equation(placement):
    """x + f(norm(x)) or norm(x + f(x)), mixer first, by hand."""
    net = functional(changed(depth=1, layers=("full",), norm_placement=placement, dropout=0.0), SPEC)
    model = net.module(net.init(jax.random.key(2)))
    x = jax.random.normal(jax.random.key(3), (2, 6, 12))
    block = model.topology.blocks[0]
    if placement == "pre":
        want = x + block.mixer(block.mix.norm(x))
        want = want + block.channel(block.transform.norm(want))
        want = model.topology.norm(want)
    else:
        want = block.mix.norm(x + block.mixer(x))
        want = block.transform.norm(want + block.channel(want))
        assert model.topology.norm is None
    np.testing.assert_allclose(model.topology(x), want, atol=1e-6)


def test_pattern():
    assert pattern(("a", "b"), (), 5) == ["a", "b", "a", "b", "a"]
    assert pattern(("near",), ((0, "full"), (-1, "full")), 4) == ["full", "near", "near", "full"]
    for layers, overrides, depth in (((), (), 2), (("a", "b"), (), 1), (("a",), ((2, "b"),), 2)):
        with pytest.raises(ConfigError):
            pattern(layers, overrides, depth)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"layers": ("pool", "ful")}, "layers"),
        ({"layer_overrides": ((0, "mlp"),)}, "layer_overrides"),
        ({"channel": "full"}, "channel"),
        ({"head": {"name": "language_model"}}, "causal"),
        ({"causal": True}, "head.pooling"),
        ({"positions": {"name": "rotary"}, "layers": ("pool",)}, "positions.name"),
        ({"parts": {**MODEL["parts"], "full": {"kind": "softmax", "num_heads": 5}}}, "parts.full.num_heads"),
        (
            {"parts": {**MODEL["parts"], "full": {"kind": "softmax", "num_heads": 3, "kv_heads": 2}}},
            "parts.full.kv_heads",
        ),
        ({"parts": {**MODEL["parts"], "full": {"kind": "softmax", "implementation": "fast"}}}, "parts.full"),
        ({"parts": {**MODEL["parts"], "pool": {"kind": "pooling", "size": 2}}}, "parts.pool.size"),
        ({**LANGUAGE, "parts": {**MODEL["parts"], "full": {"kind": "fourier"}}}, "parts.full.kind"),
    ],
)
def test_refusals_name_the_field(fields, path):
    with pytest.raises(ConfigError) as caught:
        functional(changed(**fields), SPEC)
    assert caught.value.path.startswith(path)


@pytest.mark.parametrize("positions", ["sinusoid", "learned", "rotary", "none"])
def test_language_model_decodes_as_it_trains(positions):
    """Stepwise logits equal the parallel ones, and no logit sees a later token."""
    fields = {**LANGUAGE, "layers": ("pool", "full", "lin"), "positions": {"name": positions}}
    parts = {**MODEL["parts"], "lin": {"kind": "linear", "num_heads": 2}}
    net = functional(changed(**fields, parts=parts), InputSpec(11, 11, 9))
    params = net.init(jax.random.key(4))
    tokens = jax.random.randint(jax.random.key(5), (2, 9), 1, 11)
    logits = net.apply(params, tokens)
    step = jax.jit(lambda p, x, state: net.module(p).step(x, state))
    state, outputs = net.module(params).init_state(2, 9), []
    for t in range(9):
        y, state = step(params, tokens[:, t], state)
        outputs.append(y)
    assert rel_rms(jnp.stack(outputs, 1), logits) < 1e-4
    later = net.apply(params, tokens.at[:, 5:].set(3))
    np.testing.assert_allclose(later[:, :5], logits[:, :5], atol=1e-5)


def test_pooling_heads():
    x = jax.random.normal(jax.random.key(6), (3, 6, 4))
    keep = jnp.arange(6) < jnp.array([[6], [2], [0]])
    build = {kind: Classifier(4, num_classes=5, pooling=kind, rngs=nnx.Rngs(0)) for kind in ("cls", "mean", "last")}
    want = {
        "cls": x[:, 0],
        "mean": jnp.stack([x[0].mean(0), x[1, :2].mean(0), jnp.zeros(4)]),
        "last": jnp.stack([x[0, 5], x[1, 1], x[2, 0]]),
    }
    for kind, head in build.items():
        np.testing.assert_allclose(head(x, keep), head.out(want[kind]), atol=1e-6)


def test_sinusoid_equation():
    got = np.asarray(Sinusoid(5)(jnp.zeros((1, 7, 5)), start=3))[0]
    for t in range(7):
        for i in range(5):
            angle = (t + 3) / 10_000 ** ((i - i % 2) / 5)
            assert got[t, i] == pytest.approx(np.cos(angle) if i % 2 else np.sin(angle), abs=1e-5)


def test_rotary_scores_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(7), (2, 1, 1, 1, 7))
    rotary = Rotary(7)

    def score(t, s):
        return float(jnp.sum(rotary.rotate(q, t) * rotary.rotate(k, s)))

    assert score(5, 2) == pytest.approx(score(103, 100), abs=1e-4)
    assert abs(score(5, 2) - score(5, 4)) > 1e-3
    np.testing.assert_allclose(jnp.linalg.norm(rotary.rotate(q, 9)), jnp.linalg.norm(q), rtol=1e-5)


def test_norm_equations():
    x = np.asarray(jax.random.normal(jax.random.key(8), (3, 6)) * 3 + 1, np.float64)
    layer = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    rms = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    scale = np.sqrt(6) * x / np.linalg.norm(x, axis=-1, keepdims=True)
    for norm, want in (
        (Layer(6, rngs=nnx.Rngs(0)), layer),
        (RMS(6, rngs=nnx.Rngs(0)), rms),
        (Scale(6, rngs=nnx.Rngs(0)), scale),
    ):
        assert rel_rms(norm(jnp.asarray(x, jnp.float32)), want) < 1e-5
    assert bool(jnp.isfinite(jax.grad(lambda x: Scale(6, rngs=nnx.Rngs(0))(x).sum())(jnp.zeros((2, 6)))).all())


def test_channel_mixer_equations():
    x = jax.random.normal(jax.random.key(9), (2, 4, 6))

    def gelu(a):
        return 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))

    def silu(a):
        return a / (1 + np.exp(-a))

    mlp = MLP(6, hidden=10, rngs=nnx.Rngs(0))
    x64 = np.asarray(x, np.float64)
    want = gelu(x64 @ mlp.up.kernel[...] + mlp.up.bias[...]) @ mlp.down.kernel[...] + mlp.down.bias[...]
    assert rel_rms(mlp(x), want) < 1e-5
    for kind, gate in ((SwiGLU, silu), (GEGLU, gelu)):
        glu = kind(6, ratio=1.5, rngs=nnx.Rngs(0))
        assert glu.up.kernel.shape == (6, 9)
        want = (gate(x64 @ glu.gate.kernel[...]) * (x64 @ glu.up.kernel[...])) @ glu.down.kernel[...]
        assert rel_rms(glu(x), want) < 1e-5
