"""The TPU kernels of linear attention by interpretation, against the reference one token at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import dispatch, mosaic_tpu
from kernels_pallas.linear_attention import linear_attention, tiles
from kernels_pallas.linear_attention.pallas_tpu import linear_attention_tpu
from kernels_pallas.linear_attention.ref import linear_attention_ref
from tests.kernels_pallas.test_linear_attention import by_loops, make_inputs
from tests.numerics import rel_rms

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
DECAYS = [None, "head", "channel"]
SMALL = {None: {"chunk": 16, "step": 48, "heads": 2}, "channel": {"chunk": 16, "step": 32, "heads": 1}}
SMALL["head"] = SMALL[None]


@functools.partial(jax.jit, static_argnums=0)
def forward_and_grads(function, arrays):
    def loss(arrays):
        y, state = function(*(arrays.get(name) for name in ("q", "k", "v", "log_decay", "state")))
        weights = (jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for x in (y, state))
        return sum((x * w).sum() for x, w in zip((y, state), weights)), {"y": y, "state": state}

    (_, outputs), grads = jax.value_and_grad(loss, has_aux=True)(arrays)
    return outputs | {"d" + name: value for name, value in grads.items()}


def check(arrays, *, mode=True, **options):
    """Outputs and all gradients against the reference, which is given the same rounded inputs in float32."""
    dtype = str(arrays["q"].dtype)
    got = forward_and_grads(functools.partial(linear_attention_tpu, interpret=mode, **options), arrays)
    want = forward_and_grads(linear_attention_ref, {name: x.astype(jnp.float32) for name, x in arrays.items()})
    assert got["y"].dtype == arrays["v"].dtype
    for name in want:
        assert rel_rms(got[name], want[name]) < TOLERANCE[dtype], name


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matches_ref(dtype, decay):
    """Sizes that all differ, a length that does not divide, several chunks a step and several steps."""
    check(make_inputs(2, 101, 4, 5, 7, decay=decay, dtype=dtype, strength=0.3), **SMALL[decay])


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_strong_decay(decay):
    """exp of a sum over a chunk underflows, two tokens forget by -inf, and the weak decays after them count."""
    arrays = make_inputs(1, 70, 2, 5, 7, decay=decay, strength=30.0)
    arrays["log_decay"] = arrays["log_decay"].at[:, 40:].multiply(1e-3).at[:, jnp.array([20, 45])].set(-jnp.inf)
    options = {"chunk": 32, "step": 32, "heads": 1}
    got = forward_and_grads(functools.partial(linear_attention_tpu, interpret=True, **options), arrays)
    want_y, want_state = by_loops(**arrays)
    assert rel_rms(got["y"], want_y) < 1e-5
    assert rel_rms(got["y"][:, 45:], want_y[:, 45:]) < 1e-5
    assert rel_rms(got["state"], want_state) < 1e-5
    finite = arrays | {"log_decay": jnp.maximum(arrays["log_decay"], -200.0)}  # exp of it is 0 all the same
    want = forward_and_grads(linear_attention_ref, finite)
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-5, name


def test_one_token():
    for decay in DECAYS:
        check(make_inputs(2, 1, 1, 5, 7, decay=decay))


@pytest.mark.slow
@pytest.mark.parametrize("length", [64, 512, 1000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("decay", DECAYS)
def test_lengths(decay, dtype, length):
    """In the tiles that a TPU would have, weak decay throughout and a stretch that forgets by 1e-30."""
    arrays = make_inputs(1, length, 2, 6, 5, decay=decay, dtype=dtype, strength=0.01)
    if decay is not None:
        arrays["log_decay"] = arrays["log_decay"].at[:, 40:44].add(float(np.log(1e-30)) / 4)
    check(arrays, **({"step": 128, "heads": 1} if decay == "channel" else {}))


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_constant_strong_decay(decay):
    arrays = make_inputs(1, 200, 2, 6, 5, decay=decay)
    arrays["log_decay"] = jnp.full_like(arrays["log_decay"], -12.0)
    check(arrays, step=128, heads=1)


@pytest.mark.parametrize("decay", ["head"])
def test_no_races(decay, capsys):
    mode = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    check(make_inputs(1, 40, 2, 8, 8, decay=decay, strength=0.3), mode=mode, chunk=16, step=16, heads=1)
    assert "RACE" not in capsys.readouterr().out  # the detector itself only prints


def check_normalized(arrays, *, mode=True, got=None, **options):
    """Outputs and all gradients of the kernel with z beside the state, against the reference with a column of ones."""
    dtype = str(arrays["q"].dtype)
    kernel = functools.partial(linear_attention_tpu, normalize=True, interpret=mode, **options)
    got = forward_and_grads(got or kernel, arrays)
    want = functools.partial(linear_attention, normalize=True, implementation="ref")
    want = forward_and_grads(want, {name: x.astype(jnp.float32) for name, x in arrays.items()})
    for name in want:
        assert rel_rms(got[name], want[name]) < TOLERANCE[dtype], name


@pytest.mark.parametrize("decay", [None, "head"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_normalized(dtype, decay):
    """Padded tokens first, so that nothing divides, and in between; with a state and, in bfloat16, without."""
    arrays = make_inputs(
        2, 101, 4, 5, 7, decay=decay, dtype=dtype, strength=0.3, normalize=True, state=dtype != "bfloat16"
    )
    for here in (slice(0, 3), slice(50, 70)):
        arrays["k"] = arrays["k"].at[:, here].set(0)
    if dtype == "bfloat16":
        arrays["state"] = jnp.zeros((2, 4, 5, 8))
    check_normalized(arrays, **SMALL[decay])


def test_normalized_one_token():
    for decay in (None, "head"):
        check_normalized(make_inputs(2, 1, 1, 5, 7, decay=decay, normalize=True))


@pytest.mark.slow
@pytest.mark.parametrize("length", [64, 512])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("decay", [None, "head"])
def test_normalized_lengths(decay, dtype, length):
    check_normalized(make_inputs(1, length, 2, 6, 5, decay=decay, dtype=dtype, strength=0.01, normalize=True))


@pytest.mark.parametrize("decay", DECAYS)
def test_normalized_by_the_public_function(decay):
    """Packed rows are a decay of -inf; a decay a channel keeps the column of ones."""
    arrays = make_inputs(2, 40, 2, 5, 7, decay=decay, strength=0.3, normalize=True)
    with mosaic_tpu.interpret():
        y, state = linear_attention(**arrays, normalize=True, implementation="pallas_tpu")
        if decay == "head":
            check_normalized(
                arrays | {"log_decay": arrays["log_decay"].at[:, 20].set(-200.0)},
                got=functools.partial(linear_attention, normalize=True, implementation="pallas_tpu"),
            )
    want_y, want_state = by_loops(**arrays, normalize=True)
    assert rel_rms(y, want_y) < 1e-5
    assert rel_rms(state, want_state) < 1e-5


def test_normalized_without_races(capsys):
    mode = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    arrays = make_inputs(1, 40, 2, 8, 8, decay="head", strength=0.3, normalize=True)
    check_normalized(arrays, mode=mode, chunk=16, step=16, heads=1)
    assert "RACE" not in capsys.readouterr().out


def test_transformations():
    """vmap, jax.checkpoint and scan over the kernel, with gradients."""
    arrays = make_inputs(3, 20, 2, 5, 7, decay="head", strength=0.3, state=False)
    state = jnp.zeros((3, 2, 5, 7))

    def total(function, vmapped):
        def loss(q, k, v, g):
            inner = jax.checkpoint(lambda *args: function(*args)[0])
            if vmapped:
                y = jax.vmap(lambda *args: inner(*(x[None] for x in args))[0])(q, k, v, g, state)
            else:
                y = jax.lax.scan(lambda c, x: (c, inner(*(a[None] for a in x))[0]), 0, (q, k, v, g, state))[1]
            return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*(arrays[name] for name in ("q", "k", "v", "log_decay")))

    want = total(linear_attention_ref, False)
    for vmapped in (False, True):
        for a, b in zip(total(functools.partial(linear_attention_tpu, interpret=True, chunk=16), vmapped), want):
            assert rel_rms(a, b) < 1e-5


def test_lowered_for_a_tpu():
    """By the platform lowered for, with the tiles of the device; no kernel elsewhere."""
    shapes = [jax.ShapeDtypeStruct((1, 300, 4, 64), jnp.bfloat16)] * 3

    def text(platform):
        with dispatch.target(platform, "TPU v6 lite" if platform == "tpu" else None):
            gradient = jax.jit(jax.grad(lambda *args: linear_attention(*args)[0].astype(jnp.float32).sum(), (0, 1, 2)))
            return gradient.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()

    assert text("tpu").count("tpu_custom_call") == 2
    assert "tpu_custom_call" not in text("cpu")
    assert tiles.choose((1, 4096, 8, 128), 128, jnp.bfloat16, None, "TPU v6 lite").chunk == 256
    assert tiles.choose((1, 4096, 8, 128), 128, jnp.bfloat16, None, None).chunk == 128


def test_refusals():
    arrays = make_inputs(1, 8, 1, 4, 4, dtype="float16")
    with pytest.raises(NotImplementedError, match="the TPU has no float16; use bfloat16 or float32"):
        linear_attention_tpu(*(arrays.get(name) for name in ("q", "k", "v", "log_decay", "state")))
    wide = make_inputs(1, 8, 1, 2048, 2048)
    with pytest.raises(NotImplementedError, match="MiB of VMEM, more than the 32 MiB"):
        linear_attention_tpu(*(wide.get(name) for name in ("q", "k", "v", "log_decay", "state")))
