"""The TPU kernels of the short causal convolution, interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import mosaic_tpu
from kernels_pallas.causal_conv import causal_conv, tiles
from kernels_pallas.causal_conv.pallas_tpu import causal_conv_tpu
from tests.kernels_pallas.test_causal_conv import forward_and_grads, hidden, make_inputs
from tests.numerics import rel_rms


def agree(B, T, D, W, dtype="float32", *, mode=True, **options):
    tol = 1e-5 if dtype == "float32" else 1e-2
    arrays = make_inputs(B, T, D, W, dtype)
    with mosaic_tpu.interpret(mode):
        got = forward_and_grads("pallas_tpu", arrays, **options)
    want = forward_and_grads("ref", [a.astype(jnp.float32) for a in arrays], **options)
    for name in want:
        assert rel_rms(got[name], want[name]) < tol, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("B", "T", "D", "W", "silu", "packed"),
    [
        (2, 1, 5, 4, True, False),  # shorter than the filter, filled up to a tile
        (3, 64, 2, 2, False, True),
        (2, 101, 200, 4, True, True),  # neither tokens nor channels divide: two tiles of each
        (1, 1000, 130, 3, True, False),
    ],
)
def test_matches_ref(B, T, D, W, silu, packed, dtype):
    options = hidden(B, T) if packed else {}
    agree(B, T, D, W, dtype, activation="silu" if silu else None, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("T", [1, 15, 64, 101, 512, 1000])
@pytest.mark.parametrize("W", [1, 2, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_every_length(T, W, packed, dtype):
    agree(2, T, 7, W, dtype, activation="silu", **(hidden(2, T) if packed else {}))


@pytest.mark.parametrize("packed", [False, True])
def test_no_races(packed, monkeypatch, capsys):
    """On two cores, and where memory not yet written is NaN. The detector itself only prints."""
    monkeypatch.setattr(tiles, "CHUNK", 16)
    mode = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    length = 160 if packed else 40
    agree(2, length, 130, 4, mode=mode, activation="silu", **(hidden(2, length) if packed else {}))
    assert "RACE" not in capsys.readouterr().out


def test_without_bias_and_past():
    x, filter, _, _ = make_inputs(2, 600, 3, 4)
    with mosaic_tpu.interpret():
        got = forward_and_grads("pallas_tpu", [x, filter])
    want = forward_and_grads("ref", [x, filter])
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-5, name


def test_under_vmap_scan_and_remat():
    x, filter, bias, past = make_inputs(2, 40, 3, 4)

    def run(x, name):
        def layer(x, _):
            return causal_conv(x, filter, bias, past, activation="silu", implementation=name)[0], None

        return jax.lax.scan(jax.checkpoint(layer), x, None, length=2)[0].sum()

    stack = jnp.stack([x, 2 * x])
    with mosaic_tpu.interpret():
        got = jax.jit(jax.vmap(jax.grad(lambda x: run(x, "pallas_tpu"))))(stack)
    assert rel_rms(got, jax.vmap(jax.grad(lambda x: run(x, "ref")))(stack)) < 1e-5


def test_refuses():
    x, filter, bias, _ = make_inputs(1, 20, 3, 9)
    with pytest.raises(NotImplementedError, match="9 taps"):
        causal_conv_tpu(x, filter, bias, None, None, None, activation=None)
    with pytest.raises(NotImplementedError, match="float16"):
        causal_conv_tpu(x.astype(jnp.float16), filter[:4], bias, None, None, None, activation=None)


def test_no_leak_from_the_future():
    x, filter, bias, _ = make_inputs(1, 600, 3, 4)
    with mosaic_tpu.interpret():
        before, after = (
            causal_conv(a, filter, bias, implementation="pallas_tpu")[0] for a in (x, x.at[:, 515:].set(np.nan))
        )
    np.testing.assert_array_equal(before[:, :515], after[:, :515])
