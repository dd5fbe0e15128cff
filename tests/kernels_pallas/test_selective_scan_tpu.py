"""The TPU kernels of the selective scan by interpretation, against ref; several tiles of time and of channels."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import dispatch, mosaic_tpu
from kernels_pallas.selective_scan import IMPLEMENTATIONS, api, selective_scan
from kernels_pallas.selective_scan.pallas_tpu import selective_scan_tpu
from tests.kernels_pallas.test_selective_scan import forward_and_grads, make_inputs
from tests.numerics import rel_rms


@pytest.fixture
def small_tiles(monkeypatch):
    """128 channels, so that 140 have two tiles."""
    monkeypatch.setitem(IMPLEMENTATIONS, "pallas_tpu", functools.partial(selective_scan_tpu, tile=(128, 128)))


def compare(arrays, tolerance=1e-5, mode=True):
    with mosaic_tpu.interpret(mode):
        got = forward_and_grads("pallas_tpu", arrays)
    want = forward_and_grads("ref", {n: x if x.dtype == bool else x.astype(jnp.float32) for n, x in arrays.items()})
    assert got.keys() == want.keys()
    for name in want:
        assert rel_rms(got[name], want[name]) < tolerance, name
    return got


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 1, 5, 3), {}),
        ((1, 101, 6, 17), {"strength": 1e-4}),  # nearly no decay; N of three registers
        ((2, 150, 140, 9), {"reset": True}),
        ((2, 128, 128, 8), {"state": False, "strength": 10.0}),  # products below 1e-30 within a few tokens
    ],
)
def test_matches_ref(shape, options):
    compare(make_inputs(*shape, **options))


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 64, 101, 512, 1000])
@pytest.mark.parametrize("options", [{"strength": 1e-4}, {"strength": 0.1, "reset": True}, {"strength": 10.0}])
def test_all_lengths(length, options):
    compare(make_inputs(2, length, 37, 5, **options))


@pytest.mark.slow
def test_two_registers_of_tokens_a_tile(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "pallas_tpu", functools.partial(selective_scan_tpu, tile=(256, 128)))
    compare(make_inputs(2, 300, 37, 5, strength=0.1, reset=True))


@pytest.mark.usefixtures("small_tiles")
def test_bfloat16():
    arrays = make_inputs(2, 135, 130, 7, dtype="bfloat16", strength=0.1)
    got = compare(arrays, 1e-2)
    assert all(got[name].dtype == jnp.bfloat16 for name in ("y", "du", "ddelta", "dB", "dC", "dD"))
    assert got["dA"].dtype == got["state"].dtype == jnp.float32


@pytest.mark.usefixtures("small_tiles")
def test_no_races(capsys):
    compare(make_inputs(1, 256, 128, 8), mode=pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2))
    assert "RACE" not in capsys.readouterr().out  # the detector itself only prints


@pytest.mark.usefixtures("small_tiles")
def test_under_vmap_remat_and_scan():
    arrays = make_inputs(2, 20, 5, 3, state=False)
    names = ("u", "delta", "B", "C")

    def loss(*given, implementation="pallas_tpu"):
        args = dict(zip(names, given))
        return (selective_scan(**args, A=arrays["A"], implementation=implementation)[0] ** 2).sum()

    def stacked(*given):
        return jax.lax.scan(lambda total, each: (total + loss(*each), None), 0.0, given)[0]

    given = [arrays[name] for name in names]
    want = jax.grad(functools.partial(loss, implementation="ref"))(*given)
    forms = [lambda *given: jax.vmap(jax.checkpoint(loss))(*given).sum(), jax.checkpoint(stacked)]
    with mosaic_tpu.interpret():
        for form in forms:
            assert rel_rms(jax.jit(jax.grad(form))(*(x[:, None] for x in given))[:, 0], want) < 1e-5


def test_is_chosen_for_a_tpu():
    shapes = [(2, 40, 5), (2, 40, 5), (5, 3), (2, 40, 3), (2, 40, 3)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    for platform, kernel in (("tpu", True), ("cuda", False)):
        with dispatch.target(platform):
            step = jax.jit(jax.grad(lambda *args: selective_scan(*args)[0].sum()))
            text = step.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
        assert ("selective_scan_backward" in text) == kernel


def test_what_it_refuses():
    arrays = make_inputs(1, 8, 4, 3)
    half = {name: x.astype(jnp.float16) for name, x in arrays.items()}
    with dispatch.target("tpu"), pytest.raises(NotImplementedError, match="no float16"):
        selective_scan(**half, implementation="pallas_tpu")
    wide = make_inputs(1, 8, 4, 3000)
    scan = functools.partial(api.selective_scan_tpu, **{n: x for n, x in wide.items() if n != "u"}, reset=None)
    with pytest.raises(NotImplementedError, match=r"need .* MiB of VMEM"):
        jax.eval_shape(jax.grad(lambda u: scan(u)[0].sum()), wide["u"])
