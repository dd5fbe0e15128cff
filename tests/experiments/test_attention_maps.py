"""experiments.attention_maps: the maps are the mixers' own weights, of the tokens they really get."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arch.errors import ConfigError
from arch.model import functional
from arch.registry import MIXERS
from arch.spec import InputSpec
from configs import parts
from experiments import attention_maps
from experiments.data.spelling import from_bytes, spell
from experiments.maps import capture, page, pictures

SPEC = InputSpec(vocab_size=11, num_classes=3, length=6)
INPUTS = jnp.array([[1, 5, 3, 2, 0, 0]])


def build(mixers, layers, **changes):
    tree = parts.metaformer(width=8, depth=2, mixers=mixers, layers=layers).to_dict()
    net = functional({**tree, **changes}, SPEC)
    return net.module(net.init(jax.random.key(0)))


def test_capture_takes_each_layers_weights():
    model = build({"near": {"kind": "local", "num_heads": 2, "block": 2}, "all": {"kind": "softmax"}}, ("near", "all"))
    want = model(INPUTS)
    x = model.positions(jnp.concatenate([jnp.zeros((1, 1, 8)), model.embed(INPUTS)], 1))
    keep = jnp.array([[True, True, True, True, True, False, False]])
    first, second = model.topology.blocks
    near = first.mixer.weights(first.mix.norm(x), keep=keep)
    far = second.mixer.weights(second.mix.norm(first(x, keep=keep)), keep=keep)
    layers, without = capture.watch(model)
    np.testing.assert_array_equal(model(INPUTS), want)  # looking changes nothing
    assert [(layer.path, layer.kind) for layer in layers] == [
        ("topology/blocks/0/mixer", "local"),
        ("topology/blocks/1/mixer", "softmax"),
    ]
    assert without == []
    np.testing.assert_allclose(layers[0].weights, near, atol=1e-6)
    np.testing.assert_allclose(layers[1].weights, far, atol=1e-6)
    assert layers[1].weights.shape == (1, 8, 7, 7)


def test_mixers_without_weights_are_named():
    _, without = capture.watch(build({"pool": {"kind": "pooling"}, "all": {"kind": "softmax"}}, ("pool", "all")))
    assert without == ["pooling (topology/blocks/0/mixer)"]
    with pytest.raises(ConfigError, match=r"no attention weights: pooling .*; those with: .*softmax"):
        capture.watch(build({"pool": {"kind": "pooling"}}, ("pool",)))
    with pytest.raises(ConfigError, match="scan=False"):
        capture.watch(build({"all": {"kind": "softmax"}}, ("all",), scan=True))


def test_a_wrapper_speaks_for_its_mixer():
    _, without = capture.watch(
        build({"both": parts.MIXERS["bidirectional-mamba"], "all": {"kind": "softmax"}}, ("both", "all"))
    )
    assert without == ["bidirectional (topology/blocks/0/mixer)"]


def test_reading_row():
    weights, keep = np.random.default_rng(0).random((2, 4, 4)), np.array([True, True, True, False])
    np.testing.assert_array_equal(capture.reading_row(weights, keep, "cls"), weights[:, 0])
    np.testing.assert_array_equal(capture.reading_row(weights, keep, "last"), weights[:, 2])
    np.testing.assert_allclose(capture.reading_row(weights, keep, "mean"), weights[:, :3].mean(1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [name for name in MIXERS.names() if hasattr(MIXERS[name], "weights")])
def test_every_mixer_with_weights_has_maps(kind):
    causal = "bidirectional" not in MIXERS[kind].modes
    head = {"pooling": "last"} if causal else {}
    tree = parts.metaformer(width=16, depth=1, mixer=parts.MIXERS[kind], head=head).to_dict()
    net = functional({**tree, "causal": causal}, SPEC)
    model = net.module(net.init(jax.random.key(0)))
    layers, _ = capture.watch(model)
    model(INPUTS)
    (layer,) = layers
    assert layer.kind == kind
    assert layer.weights.shape[2:] == (6 + model.with_cls,) * 2


def test_the_command(tmp_path, capsys):
    file = tmp_path / "tiny_maps.py"
    file.write_text(
        "from tests.experiments import tiny\n\n\ndef get_config():\n    config = tiny.get_config()\n"
        "    config.model.parts.mixer.kind = 'softmax'\n    return config\n"
    )
    out = tmp_path / "maps"
    words = [f"--config={file}", f"--out={out}", "--examples=2"]
    assert attention_maps.main(words) == 0
    assert capsys.readouterr().out.split() == [str(out / "example-0.html"), str(out / "example-1.html")]
    names = {"index.html", *(f"example-{n}{end}" for n in (0, 1) for end in (".html", "-heads.png", "-row.png"))}
    assert {path.name for path in out.iterdir()} == names
    text = (out / "example-0.html").read_text()
    assert "layer 2, softmax: mean of 2 heads" in text
    assert "not trained" in text
    assert text.count("data:image/png;base64,") == 2
    assert (out / "example-0-heads.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out=x"], "--run: give either"),
        (["--out=x", "--run=nowhere"], "--run: nowhere has no config.json"),
    ],
)
def test_mistakes(words, message, capsys):
    assert attention_maps.main(words) == 2
    assert message in capsys.readouterr().err


def test_shades_are_relative_and_escaped():
    tokens, keep = ["<b>", "a", "c", "pad"], np.array([True, True, True, False])
    text = page.shaded(tokens, np.array([0.5, 0.25, -0.5, 9.0]), keep)
    assert "&lt;b&gt;" in text
    assert "pad" not in text
    assert re.findall(r'--a:([\d.]+)">', text) == ["1", "0.5", "1"]
    assert text.count('class="n"') == 1


def test_long_maps_are_thinned_to_means():
    wide = np.arange(600 * 300, dtype=float).reshape(600, 300)
    thin = pictures.thin(wide)
    assert thin.shape == (200, 150)
    np.testing.assert_allclose(thin[0, 0], wide[:3, :2].mean())
    np.testing.assert_allclose(thin[-1, -1], wide[597:, 298:].mean())


def test_spelling():
    assert from_bytes([66, 11, 33, 200]) == ["A", "\n", " ", "·"]
    assert spell(object(), np.array([3, 4])) == ["3", "4"]
