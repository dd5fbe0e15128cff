"""The head of pairs: its equation, its parameters, and which head goes with which task."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arch.errors import ConfigError
from arch.heads import Matching
from arch.model import functional
from arch.spec import InputSpec
from tests.numerics import rel_rms

MODEL = {
    "topology": "metaformer",
    "width": 8,
    "depth": 1,
    "layers": ("mixer",),
    "channel": None,
    "parts": {"mixer": {"kind": "softmax", "num_heads": 2}},
    "norm": {"name": "layer"},
    "positions": {"name": "sinusoid"},
    "head": {"name": "matching", "hidden": 6, "pooling": "first"},
}
PAIR = InputSpec(vocab_size=11, num_classes=2, length=5, pair=True)


def with_head(**head):
    return {**MODEL, "head": {"name": "matching", "hidden": 6, **head}}


@pytest.mark.parametrize("features", ["concat", "nli"])
@pytest.mark.parametrize("pooling", ["cls", "first", "mean"])
def test_matching_equation(pooling, features):
    x = jax.random.normal(jax.random.key(0), (3, 2, 6, 4))
    keep = jnp.arange(6) < jnp.array([[[6], [2]], [[1], [6]], [[3], [0]]])
    head = Matching(4, num_classes=5, hidden=7, pooling=pooling, features=features, rngs=nnx.Rngs(0))
    x64, mask = np.asarray(x, np.float64), np.asarray(keep, np.float64)
    pooled = x64[:, :, 0]
    if pooling == "mean":
        pooled = np.einsum("bptd,bpt->bpd", x64, mask) / np.maximum(mask.sum(-1), 1)[..., None]
    a, b = pooled[:, 0], pooled[:, 1]
    z = np.concatenate([a, b] if features == "concat" else [a, b, a * b, a - b], axis=1)
    for layer in (head.hidden, head.second):
        z = np.maximum(z @ layer.kernel[...] + layer.bias[...], 0)
    assert head.second.kernel.shape == (7, 3)
    assert rel_rms(head(x, keep), z @ head.out.kernel[...] + head.out.bias[...]) < 1e-5


def test_a_pair_model_reads_each_input_alone_and_both_decide():
    """Swapping the inputs swaps a and b; the padding of one does not reach the other."""
    net = functional(with_head(pooling="cls"), PAIR)
    params = net.init(jax.random.key(1))
    tokens = jax.random.randint(jax.random.key(2), (4, 2, 5), 1, 11).at[0, 1, 3:].set(0)
    logits = net.apply(params, tokens)
    assert logits.shape == (4, 2)
    assert float(jnp.abs(net.apply(params, tokens[:, ::-1]) - logits).max()) > 1e-4
    changed = params | {"head": {**params["head"], "hidden": dict(params["head"]["hidden"])}}
    kernel = params["head"]["hidden"]["kernel"]
    changed["head"]["hidden"]["kernel"] = jnp.concatenate([kernel[8:], kernel[:8]])  # b's rows first
    np.testing.assert_allclose(net.apply(changed, tokens[:, ::-1]), logits, atol=1e-5)
    keep = tokens != 0
    np.testing.assert_allclose(net.apply(params, jnp.where(keep, tokens, 7), keep), logits, atol=1e-5)


def test_the_head_goes_with_the_task():
    functional(with_head(), PAIR).abstract()
    with pytest.raises(ConfigError, match=r"head.name: the task gives two inputs an example; choose matching"):
        functional({**MODEL, "head": {"name": "classifier"}}, PAIR)
    with pytest.raises(ConfigError, match=r"head.name: the task gives one input an example; choose classifier"):
        functional(with_head(), InputSpec(vocab_size=11, num_classes=2, length=5))
    with pytest.raises(ConfigError, match="causal"):
        functional({**with_head(pooling="mean"), "causal": True}, PAIR)


def test_the_cls_token_is_there_for_cls_pooling_alone():
    assert "cls" in functional(with_head(), PAIR).abstract()
    assert "cls" not in functional(with_head(pooling="first"), PAIR).abstract()
