"""The hybrids of configs/hybrid: what stands in which layer, and that those on MQAR decode as they train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arch.model import functional
from arch.spec import InputSpec
from configs.hybrid import layers, mqar
from configs.synthetic import recipe
from experiments import config as configs

SPEC = InputSpec(vocab_size=13, num_classes=13, length=12)
SMALL = {"delta_net": {"num_heads": 1}, "mamba": {"state_size": 4}, "moe": {"capacity": 2.0, "hidden": 8}}


def model(name, depth):
    sections = {**{mixer: recipe.part(mixer, causal=True) for mixer in mqar.MIXERS}, **mqar.CHANNELS}
    sections = {part: {**section, **SMALL.get(part, {})} for part, section in sections.items()}
    found = layers.hybrid(name, width=16, depth=depth, sections=sections, channel="mlp")
    found.head, found.causal = {"name": "language_model"}, True
    return configs.plain(found)


def kinds(name, depth):
    """The mixers and channel mixers of the built model, layer by layer."""
    net = functional(model(name, depth), SPEC)
    blocks = net.module(net.abstract()).topology.blocks
    return [(type(block.mixer).__name__, type(block.channel).__name__) for block in blocks]


@pytest.mark.parametrize(
    ("name", "depth", "mixers", "channels"),
    [
        ("delta_net-local", 6, "DLDLDL", "MMMMMM"),
        ("delta_net-global", 8, "DSDDSDDD", "MMMMMMMM"),  # the 2nd and the 8/2 + 1 = 5th
        ("delta_net-global", 4, "DSSD", "MMMM"),
        ("samba", 4, "mLmL", "MMMM"),
        ("jamba", 8, "mmSmmmSm", "MEMEMEME"),
        ("hyena-softmax", 5, "HHSSS", "MMMMM"),
        ("looped", 6, "S", "M"),
        ("parallel", 3, "SSS", "MMM"),
        ("experts", 4, "SSSS", "GEGE"),
    ],
)
def test_layers(name, depth, mixers, channels):
    letters = {"DeltaNet": "D", "Local": "L", "Softmax": "S", "Mamba": "m", "Hyena": "H"}
    others = {"MLP": "M", "MoE": "E", "SwiGLU": "G"}
    found = kinds(name, depth)
    assert "".join(letters[mixer] for mixer, _ in found) == mixers
    assert "".join(others[channel] for _, channel in found) == channels


def test_every_hybrid_is_tested():
    assert set(layers.HYBRIDS) == {
        *("delta_net-local", "delta_net-global", "samba", "jamba", "hyena-softmax", "looped", "parallel", "experts")
    }


@pytest.mark.parametrize("name", ["delta_net-local", "jamba", "looped", "parallel"])
def test_decodes_as_it_trains(name):
    """Token by token the logits of the whole row come out, and none sees a later token."""
    net = functional(model(name, 4), SPEC)
    params = net.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, SPEC.length), 1, SPEC.vocab_size)
    apply = jax.jit(net.apply)
    logits = apply(params, tokens)
    step = jax.jit(lambda p, x, state: net.module(p).step(x, state))
    state, outputs = net.module(params).init_state(2, SPEC.length), []
    for t in range(SPEC.length):
        y, state = step(params, tokens[:, t], state)
        outputs.append(y)
    np.testing.assert_allclose(jnp.stack(outputs, 1), logits, atol=2e-4)
    later = apply(params, tokens.at[:, 7:].set(1))
    np.testing.assert_allclose(later[:, :7], logits[:, :7], atol=1e-5)
