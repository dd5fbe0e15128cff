"""The pyramid: grids and widths of its stages, mixers of sequences on grids, group norm, the scales of branches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arch.errors import ConfigError
from arch.mixers.softmax import Softmax
from arch.model import Model, functional
from arch.norms import Group
from arch.spec import ImageSpec, InputSpec
from arch.strided_conv import StridedConv
from arch.topologies.block import mix
from arch.topologies.pyramid import Pyramid
from tests.numerics import rel_rms

SPEC = ImageSpec(height=24, width=16, channels=3, num_classes=5)
PARTS = {
    "pool": {"kind": "pooling"},
    "conv": {"kind": "conv", "grid_axes": 2, "size": 3},
    "full": {"kind": "softmax", "num_heads": 2},
    "mlp": {"kind": "mlp", "ratio": 2.0},
}


def config(**options):
    return {
        "topology": "pyramid",
        "widths": (4, 6),
        "depths": (1, 2),
        "stages": ("pool", ("conv", "full")),
        "parts": PARTS,
        "norm": {"name": "group"},
        "embedding": {"name": "stem", "size": 7, "stride": 4, "padding": 2},
        "positions": {"name": "none"},
        "head": {"name": "classifier", "pooling": "mean"},
        **options,
    }


def build(spec=SPEC, **options) -> Model:
    return Model(config(**options), spec, rngs=nnx.Rngs(0))


def refusal(spec=SPEC, **options) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        build(spec, **options)
    return caught.value


def test_grids_and_widths_of_the_stages():
    """24 x 16 pixels: a stem of stride 4 gives 6 x 4 tokens of 4, the second stage 3 x 2 of 6."""
    model = build()
    assert model.embed.grid == (6, 4)
    x = model.embed(jnp.ones((2, 24, 16, 3)))
    assert x.shape == (2, 6, 4, 4)
    assert model.topology(x).shape == (2, 3, 2, 6)
    assert [type(block.mixer).__name__ for block in model.topology.stages[1].blocks] == ["Conv", "Softmax"]
    net = functional(config(), SPEC)
    params = net.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 24, 16, 3))
    logits = net.apply(params, x)
    assert logits.shape == (2, 5)
    assert logits.dtype == jnp.float32
    low = net.apply(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), x)
    assert rel_rms(low, logits) < 0.05


def test_strided_conv_is_its_equation():
    conv = StridedConv(2, 3, grid=(5, 4), size=3, stride=2, padding=1, rngs=nnx.Rngs(0))
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 5, 4, 2)))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel, bias = np.asarray(conv.kernel[...]), np.asarray(conv.bias[...])
    want = np.zeros((2, *conv.grid, 3))
    for i, j in np.ndindex(*conv.grid):
        window = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        want[:, i, j] = np.einsum("byxc,yxcd->bd", window, kernel) + bias
    assert conv.grid == (3, 2)
    assert rel_rms(conv(jnp.asarray(x)), want) < 1e-5


def test_a_mixer_of_sequences_gets_the_grid_in_row_major_order():
    mixer = Softmax(6, causal=False, num_heads=2, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 3, 2, 6))
    rows = [x[:, i, j] for i in range(3) for j in range(2)]
    want = mixer(jnp.stack(rows, axis=1)).reshape(x.shape)
    np.testing.assert_array_equal(mix(mixer, x), want)

    stage = build().topology.stages[1]  # and so in the model
    block = stage.blocks[1]
    middle = x + block.mixer(block.mix.norm(x).reshape(2, 6, 6)).reshape(x.shape)
    np.testing.assert_allclose(block(x), middle + block.channel(block.transform.norm(middle)), atol=1e-6)


def test_group_norm_is_its_equation():
    norm = Group(3, eps=1e-3)
    norm.scale[...], norm.bias[...] = jnp.array([1.0, 2.0, 0.5]), jnp.array([0.1, -0.2, 0.3])
    x = np.asarray(jax.random.normal(jax.random.key(0), (4, 5, 2, 3)) * 3 + 7, np.float64)
    mean = x.mean(axis=(1, 2, 3), keepdims=True)
    want = (x - mean) / np.sqrt(x.var(axis=(1, 2, 3), keepdims=True) + 1e-3) * norm.scale[...] + norm.bias[...]
    assert rel_rms(norm(jnp.asarray(x, jnp.float32)), want) < 1e-5
    assert norm(jnp.ones((2, 5, 3), jnp.bfloat16)).dtype == jnp.bfloat16


def test_scales_start_where_they_should():
    """LayerScale 1e-5 leaves a block nearly the identity; the passing branch is scaled in the second stage only."""
    model = build(layer_scale=1e-5, residual_scale=(None, 0.5), norm={"name": "layer"})
    first, second = model.topology.stages[0].blocks[0], model.topology.stages[1].blocks[0]
    assert first.mix.residual_scale is None
    np.testing.assert_array_equal(second.transform.residual_scale[...], np.full(6, 0.5))
    np.testing.assert_array_equal(first.mix.scale[...], np.full(4, 1e-5, np.float32))
    x = jax.random.normal(jax.random.key(0), (2, 6, 4, 4))
    assert 0 < rel_rms(first(x), x) < 1e-4
    x = jax.random.normal(jax.random.key(0), (2, 3, 2, 6))
    assert rel_rms(second(x), 0.25 * x) < 1e-3


def test_stochastic_depth():
    """Its rate grows from 0 to drop_path over all blocks; it drops whole branches of single examples, without bias."""
    model = build(drop_path=0.4, norm={"name": "layer"})
    blocks = [block for stage in model.topology.stages for block in stage.blocks]
    rates = [0.0 if block.mix.drop_path.inner is None else block.mix.drop_path.inner.rate for block in blocks]
    np.testing.assert_allclose(rates, [0.0, 0.2, 0.4])

    last, rows = blocks[-1].mix, 2000
    x = jnp.ones((rows, 3, 2, 6))
    branch = np.asarray(last.add(x, 2 * x) - x)
    kept = branch[:, 0, 0, 0] > 0
    np.testing.assert_allclose(
        branch, np.where(kept, 2 / 0.6, 0)[:, None, None, None] * np.ones((1, 3, 2, 6)), rtol=1e-6
    )
    assert abs(kept.mean() - 0.6) < 4 * np.sqrt(0.6 * 0.4 / rows)  # four standard deviations
    model.eval()
    np.testing.assert_allclose(last.add(x, 2 * x), 3 * x)


def test_last_norm_and_the_baselines_head():
    model = build(last_norm=False, head={"name": "metaformer", "ratio": 2.0})
    assert model.topology.norm is None
    head = model.head
    head.norm.scale[...] = jnp.arange(6.0)
    x = jax.random.normal(jax.random.key(0), (2, 4, 6))

    def norm(z, scale):
        return (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6) * scale

    z = norm(np.asarray(x, np.float64).mean(1), np.arange(6.0))
    z = np.maximum(z @ head.hidden.kernel[...] + head.hidden.bias[...], 0) ** 2
    want = norm(z, np.ones(12)) @ head.out.kernel[...] + head.out.bias[...]
    assert rel_rms(head(x, jnp.ones((2, 4), bool)), want) < 1e-5


def test_scan_over_the_layers_of_a_stage():
    """The repeated layers of a stage as one loop: the same logits from the same weights."""
    options = {"depths": (1, 2), "stages": ("pool", "conv"), "norm": {"name": "layer"}}
    plain = functional(config(**options), SPEC)
    with pytest.raises(ConfigError, match="scan"):  # a stage of one layer has nothing to repeat
        functional(config(**options, scan=True), SPEC)
    options["depths"] = (2, 2)
    plain, scanned = (functional(config(**options, scan=scan), SPEC) for scan in (False, True))
    params = plain.init(jax.random.key(0))
    stacked = {**params, "topology": {**params["topology"], "stages": {}}}
    for i, stage in params["topology"]["stages"].items():
        blocks = jax.tree.map(lambda *layers: jnp.stack(layers), stage["blocks"]["0"], stage["blocks"]["1"])
        stacked["topology"]["stages"][i] = {"blocks": {"0": {"blocks": {"0": blocks}}}}
    x = jax.random.normal(jax.random.key(1), (2, 24, 16, 3))
    assert rel_rms(scanned.apply(stacked, x), plain.apply(params, x)) < 1e-6


@pytest.mark.parametrize(
    ("options", "path", "words"),
    [
        ({"depths": (1,)}, "depths", "widths has 2"),
        ({"stages": ("pool",)}, "stages", "widths has 2"),
        ({"residual_scale": (None,)}, "residual_scale", "widths has 2"),
        ({"channel": ("mlp",)}, "channel", "widths has 2"),
        ({"widths": ()}, "widths", "no stages"),
        ({"stages": ("pool", "fool")}, "stages", "did you mean"),
        ({"stages": (("pool", "conv"), "conv")}, "stages", "depth of 1"),
        ({"stages": ("pool", "mlp")}, "stages", "no mixer"),
        ({"channel": "conv"}, "channel", "no channel mixer"),
        ({"stages": ("pool", "mamba"), "parts": {**PARTS, "mamba": {"kind": "mamba"}}}, "parts.mamba.kind", "form"),
        ({"down_stride": 9}, "down_stride", "cannot shrink a grid of (6, 4)"),
        ({"down_size": 9, "down_padding": 0}, "down_size", "does not fit a grid of (6, 4)"),
        ({"embedding": {"name": "patches", "size": 4, "flatten": True}}, "topology", "grid of an image"),
        ({"causal": True}, "causal", "grid"),
        ({"head": {"name": "classifier"}}, "head.pooling", "CLS"),
        ({"positions": {"name": "rotary"}}, "positions.name", "rotary"),
    ],
)
def test_refusals(options, path, words):
    error = refusal(**options)
    assert error.path == path
    assert words in error.problem


def test_small_images_are_refused_by_field():
    assert refusal(ImageSpec(2, 2, 3, 5)).path == "embedding.stride"
    error = refusal(ImageSpec(4, 4, 3, 5))
    assert error.path == "down_stride"
    assert "grid of (1, 1)" in error.problem


def test_tokens_have_no_grid_and_group_norm_no_tokens():
    spec = InputSpec(vocab_size=7, num_classes=5, length=8)
    assert refusal(spec).path == "embedding.name"
    isotropic = {
        "topology": "metaformer",
        "width": 4,
        "depth": 1,
        "layers": ("pool",),
        "parts": PARTS,
        "norm": {"name": "group"},
        "positions": {"name": "none"},
        "head": {"name": "classifier", "pooling": "mean"},
    }
    with pytest.raises(ConfigError, match=r"norm\.name: group"):
        Model(isotropic, spec, rngs=nnx.Rngs(0))
    Model({**isotropic, "embedding": {"name": "patches", "size": 8}}, SPEC, rngs=nnx.Rngs(0))


def test_whole_images_only():
    topology = build().topology
    assert isinstance(topology, Pyramid)
    with pytest.raises(ConfigError, match="whole images"):
        topology(jnp.ones((1, 6, 4, 4)), keep=jnp.ones((1, 6, 4), bool))
