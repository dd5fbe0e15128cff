"""The image models at 224 pixels have the published numbers of parameters and multiply-accumulates."""

import jax
import jax.numpy as jnp
import pytest

from arch import flops
from arch.accounting import count_params
from arch.ops.depthwise import depthwise
from configs.metaformer.published import PUBLISHED
from experiments import config
from scripts.vision_sizes import SPEC, agrees, mismatches, sizes, table

QUICK = ("poolformer.py:s12", "baselines.py:randformer_s12", "baselines.py:caformer_s18")


@pytest.mark.parametrize(
    "source",
    [source if source.endswith(QUICK) else pytest.param(source, marks=pytest.mark.slow) for source in PUBLISHED],
)
def test_published_sizes(source):
    assert mismatches(sizes(source)) == []


@pytest.mark.parametrize(("size", "params"), [("tiny", 5_717_416), ("small", 22_050_664), ("base", 86_567_656)])
def test_deit(size, params):
    """As timm builds them (tests/peers/test_vision.py counts those)."""
    model = config.plain(config.configure(f"configs/vision/deit.py:{size}"))["model"]
    assert count_params(model, SPEC) == params


def test_products_count_convolutions_however_they_are_written():
    x = jax.ShapeDtypeStruct((1, 9, 8, 5), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 5), jnp.float32)
    assert flops.count(depthwise, x, kernel).products == 2 * 9 * 8 * 5 * 9
    weights = jax.ShapeDtypeStruct((5, 7), jnp.float32)
    assert flops.count(lambda x, w: jnp.tanh(x @ w + 1), x, weights).products == 2 * 9 * 8 * 5 * 7


def test_figures_agree_to_the_printed_digits():
    assert agrees(11_915_176, "12M")
    assert agrees(11_915_176, "11.9M")
    assert not agrees(11_915_176, "11.8M")
    assert agrees(1.8123e9, "1.8G")
    row = {"source": "x", "params": 1, "frozen": 0, "fvcore_macs": 1.8e9, "published": ("12M", None, "1.8G")}
    assert mismatches(row) == ["params: 1, published 12M"]


def test_table_shows_the_newest_row():
    row = {"source": "configs/metaformer/poolformer.py:s12", "frozen": 0, "macs": 1e9, "fvcore_macs": 2e9}
    text = table([{**row, "params": 5}, {**row, "params": 7}])
    assert "| `poolformer.py:s12` | 7 | 12M | 1.000G | 2.000G | 1.8G |" in text
    assert text.count("\n") == 2
