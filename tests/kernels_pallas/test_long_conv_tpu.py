"""The TPU kernels of the long convolution, interpreted."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import mosaic_tpu
from kernels_pallas.long_conv import long_conv, tiles
from kernels_pallas.long_conv.pallas_tpu import long_conv_tpu
from tests.kernels_pallas.test_long_conv import by_loops, make_inputs
from tests.numerics import rel_rms


@pytest.fixture(autouse=True)
def small_loops(monkeypatch):
    """Programs a quarter as long: here a CPU's compiler takes most of the time."""
    monkeypatch.setattr(tiles, "AT_ONCE", 1)


def forward_and_grads(implementation, x, filter):
    def loss(x, filter):
        y = long_conv(x, filter, implementation=implementation)
        weight = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return (y * weight.astype(jnp.bfloat16).astype(jnp.float32)).sum(), y  # a cotangent bfloat16 holds

    (_, y), (dx, dfilter) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, filter)
    return {"y": y, "dx": dx, "dfilter": dfilter}


def agree(B, T, S, D, dtype="float32", mode=True):
    x, filter = make_inputs(B, T, S, D, dtype)
    with mosaic_tpu.interpret(mode):
        got = forward_and_grads("pallas_tpu", x, filter)
    want = forward_and_grads("ref", x.astype(jnp.float32), filter.astype(jnp.float32))
    for name in want:
        assert rel_rms(got[name], want[name]) < (1e-5 if dtype == "float32" else 1e-2), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("B", "T", "S", "D"), [(1, 1, 1, 2), (3, 101, 20, 130), (2, 1025, 700, 3)])
def test_matches_ref(B, T, S, D, dtype):
    agree(B, T, S, D, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("T", [64, 101, 512, 1000, 4096])
def test_every_length(T, dtype):
    agree(2, T, T, 2, dtype)


def test_a_loud_token_does_not_drown_the_others():
    """Every output sums the whole spectrum: products of numbers rounded to bfloat16 would leave an error everywhere."""
    x, filter = make_inputs(1, 512, 512, 2, "bfloat16")
    x, filter = x.at[:, 300].mul(1000), filter.at[20:].set(0)
    with mosaic_tpu.interpret():
        got = long_conv(x, filter, implementation="pallas_tpu")
    want = by_loops(x, filter)
    assert rel_rms(got[:, :300], want[:, :300]) < 1e-2
    assert rel_rms(got[:, 320:], want[:, 320:]) < 1e-2


@pytest.mark.parametrize(("parts", "at_once", "error"), [(2, 4, 1e-5), (3, 2, 2e-6)])
def test_the_longest(parts, at_once, error, monkeypatch):
    monkeypatch.setitem(tiles.SPLIT, "float32", parts)
    x, filter = make_inputs(1, 8192, 20, 1)
    assert rel_rms(long_conv_tpu(x, filter, at_once=at_once, interpret=True), by_loops(x, filter)) < error


def test_what_is_refused():
    x, filter = make_inputs(1, 10, 10, 1)
    with pytest.raises(NotImplementedError, match="8192"):
        long_conv_tpu(jnp.zeros((1, 8193, 1)), filter)
    with pytest.raises(NotImplementedError, match="float16"):
        long_conv_tpu(x.astype(jnp.float16), filter)


@pytest.mark.parametrize("B", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_no_races(B, capsys):
    """On two cores, and where memory not yet written is NaN. The detector itself only prints."""
    mode = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    agree(B, 10, 10, 130, mode=mode)
    assert "RACE" not in capsys.readouterr().out


def test_under_vmap_and_remat():
    x, filter = make_inputs(2, 20, 20, 3)

    def grad(x, name):
        return jax.grad(lambda x: (jax.checkpoint(lambda x: long_conv(x, filter, implementation=name))(x) ** 2).sum())(
            x
        )

    stacked = jnp.stack([x, 2 * x])
    with mosaic_tpu.interpret():
        got = jax.vmap(lambda x: grad(x, "pallas_tpu"))(stacked)
    assert rel_rms(got, jax.vmap(lambda x: grad(x, "ref"))(stacked)) < 1e-5
