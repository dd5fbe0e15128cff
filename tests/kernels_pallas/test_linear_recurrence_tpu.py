"""The TPU kernels of the linear recurrence by interpretation, against ref; several tiles of time and of channels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import dispatch, mosaic_tpu
from kernels_pallas.linear_recurrence import IMPLEMENTATIONS, api, linear_recurrence
from kernels_pallas.linear_recurrence.pallas_tpu import linear_recurrence_tpu
from tests.kernels_pallas.test_linear_recurrence import assert_near, forward_and_grads, make_inputs

KINDS = ["real", "complex", "constant", "constant complex"]


@pytest.fixture
def small_tiles(monkeypatch):
    """32 tokens and 128 channels, so that short inputs have several tiles."""
    monkeypatch.setitem(IMPLEMENTATIONS, "pallas_tpu", functools.partial(linear_recurrence_tpu, tile=(32, 128)))


def compare(arrays, tolerance=1e-5, mode=True, **options):
    with mosaic_tpu.interpret(mode):
        got = forward_and_grads("pallas_tpu", arrays, **options)
    wide = {name: x if jnp.iscomplexobj(x) else x.astype(jnp.float32) for name, x in arrays.items()}
    want = forward_and_grads("ref", wide, **options)
    assert_near({n: x if jnp.iscomplexobj(x) else np.asarray(x, np.float32) for n, x in got.items()}, want, tolerance)
    return got


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("kind", "shape", "options"),
    [
        ("real", (2, 1, 130), {"reverse": True}),
        ("real", (3, 64, 7), {"strength": 0.0}),  # |a| = 1: nothing is forgotten
        ("real", (2, 101, 200), {}),
        ("real", (2, 101, 5), {"reverse": True, "strength": 30.0}),  # products below 1e-30 within a tile
        ("real", (2, 50, 6), {"reset": True, "state": False}),
        ("complex", (2, 70, 130), {}),
        ("complex", (1, 101, 3), {"reverse": True, "reset": True}),
        ("constant", (2, 64, 130), {"reverse": True}),
        ("constant", (3, 101, 5), {"strength": 0.01}),
        ("constant complex", (2, 64, 5), {}),
        ("constant complex", (2, 40, 5), {"reverse": True}),
    ],
)
def test_matches_ref(kind, shape, options):
    options = dict(options)
    reset = jnp.asarray(np.random.default_rng(1).random(shape[:2]) < 0.1) if options.pop("reset", False) else None
    reverse = options.pop("reverse", False)
    compare(make_inputs(*shape, kind=kind, **options), reset=reset, reverse=reverse)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 64, 101, 512, 1000])
@pytest.mark.parametrize("strength", [0.0, 0.01, 30.0])
@pytest.mark.parametrize("reverse", [False, True])
def test_all_lengths(kind, length, strength, reverse):
    compare(make_inputs(2, length, 37, kind=kind, strength=strength), reverse=reverse)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["real", "constant"])
def test_bfloat16(kind):
    got = compare(make_inputs(2, 75, 130, kind=kind, strength=0.2, dtype="bfloat16"), 1e-2)
    assert got["h"].dtype == got["da"].dtype == got["db"].dtype == jnp.bfloat16
    assert got["state"].dtype == jnp.float32


@pytest.mark.usefixtures("small_tiles")
def test_mixed_dtypes():
    arrays = make_inputs(2, 40, 5)
    got = compare(arrays | {"b": arrays["b"].astype(jnp.bfloat16)}, 1e-2)
    assert (got["h"].dtype, got["da"].dtype, got["db"].dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)


@pytest.mark.usefixtures("small_tiles")
def test_no_races(capsys):
    compare(make_inputs(2, 64, 256), mode=pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2))
    assert "RACE" not in capsys.readouterr().out  # the detector itself only prints


@pytest.mark.usefixtures("small_tiles")
def test_under_vmap_remat_and_scan():
    arrays = make_inputs(2, 40, 5, state=False)

    def loss(a, b):
        return (linear_recurrence(a, b, implementation="pallas_tpu")[0] ** 2).sum()

    def stacked(a, b):
        return jax.lax.scan(lambda total, ab: (total + loss(*ab), None), 0.0, (a, b))[0]

    a, b = arrays["a"][:, None], arrays["b"][:, None]
    want = jax.grad(lambda a, b: (linear_recurrence(a, b, implementation="ref")[0] ** 2).sum())(*arrays.values())
    forms = [lambda a, b: jax.vmap(jax.checkpoint(loss))(a, b).sum(), jax.checkpoint(stacked)]
    with mosaic_tpu.interpret():
        for form in forms:
            assert_near({"a": jax.jit(jax.grad(form))(a, b)[:, 0]}, {"a": want}, 1e-5)


def test_is_chosen_for_a_tpu():
    x = jax.ShapeDtypeStruct((2, 40, 5), jnp.float32)
    for platform, kernel in (("tpu", True), ("cuda", False)):
        with dispatch.target(platform):
            step = jax.jit(jax.grad(lambda a, b: linear_recurrence(a, b)[0].sum()))
            text = step.trace(x, x).lower(lowering_platforms=(platform,)).as_text()
        assert ("linear_recurrence_backward" in text) == kernel


def test_what_it_refuses():
    x = jnp.ones((1, 8, 4))
    with dispatch.target("tpu"), pytest.raises(NotImplementedError, match="no float16"):
        linear_recurrence(x.astype(jnp.float16), x.astype(jnp.float16), implementation="pallas_tpu")
    with pytest.raises(NotImplementedError, match=r"needs? .* MiB of VMEM"):
        api.linear_recurrence_tpu(x, x, x[:, 0], reverse=False, tile=(8192, 4096))
