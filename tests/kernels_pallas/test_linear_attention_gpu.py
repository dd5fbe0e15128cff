"""The GPU kernels of linear attention: by interpretation against the reference, and lowered to a CUDA module.

What a GPU computes is not seen here: interpretation has no matrix unit and no swizzle, lowering runs nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import dispatch, mosaic_gpu
from kernels_pallas.gpu_decay import decays
from kernels_pallas.linear_attention import linear_attention
from kernels_pallas.linear_attention.pallas_gpu import linear_attention_gpu
from kernels_pallas.linear_attention.ref import linear_attention_ref
from tests.kernels_pallas.gpu import grad_of, interpreted, lowered, shapes
from tests.kernels_pallas.test_linear_attention import make_inputs
from tests.numerics import rel_rms

NAMES = ("q", "k", "v", "log_decay", "state")


def run(function, arrays, grads=True):
    def loss(arrays):
        y, state = function(*(arrays.get(name) for name in NAMES))
        weights = (jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for x in (y, state))
        return sum((x * w).sum() for x, w in zip((y, state), weights)), {"y": y, "state": state}

    if not grads:
        return jax.jit(loss)(arrays)[1]
    (_, outputs), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return outputs | {"d" + name: value for name, value in found.items()}


def check(arrays, mode=True, grads=True):
    """Outputs and all gradients against the reference, which is given the same rounded inputs in float32."""
    got = run(lambda *args: linear_attention_gpu(*args, interpret=mode), arrays, grads)
    want = run(linear_attention_ref, {name: x.astype(jnp.float32) for name, x in arrays.items()}, grads)
    assert got["y"].dtype == arrays["v"].dtype
    for name in want:
        assert rel_rms(got[name].astype(jnp.float32), want[name]) < 1e-2, name


@interpreted
@pytest.mark.parametrize("decay", [None, "head"])
def test_matches_ref(decay):
    """Sizes that all differ, a length that does not divide, two blocks of values."""
    check(make_inputs(2, 101, 2, 5, 70, decay=decay, dtype="bfloat16", strength=0.3))


@interpreted
def test_float16_and_one_token():
    check(make_inputs(1, 1, 2, 65, 3, decay="head", dtype="float16", strength=0.3))


@interpreted
def test_four_chunks_without_a_race(capsys):
    """More chunks than stages, so that shared memory is used again; vector clocks see unordered accesses."""
    mode = plgpu.InterpretGPUParams(detect_races=True)
    check(make_inputs(1, 256, 1, 64, 64, decay="head", dtype="bfloat16", strength=0.05), mode)
    assert "RACE" not in capsys.readouterr().out  # the detector itself only prints


@interpreted
def test_strong_decay():
    """exp of a sum over a chunk underflows and two tokens forget by -inf: nothing is nan, what follows is exact."""
    arrays = make_inputs(1, 128, 1, 5, 7, decay="head", strength=30.0)
    arrays["log_decay"] = arrays["log_decay"].at[:, 40:].multiply(1e-4).at[:, jnp.array([20, 45])].set(-jnp.inf)
    arrays = {name: x.astype(x.dtype if name in ("state", "log_decay") else "bfloat16") for name, x in arrays.items()}
    check(arrays)
    run = jax.jit(lambda a: linear_attention_gpu(*(a[name] for name in NAMES), interpret=True))
    other = arrays | {name: arrays[name].at[:, :45].add(1.0) for name in ("k", "v")}
    np.testing.assert_array_equal(run(other)[0][:, 45:], run(arrays)[0][:, 45:])


def test_sums_of_decays_do_not_cancel():
    """A weak decay behind a strong one is as exact as alone."""
    g = np.random.default_rng(0).uniform(-1e-3, 0, (1, 64, 2)).astype(np.float32)
    g[:, 20:30] = -110.0
    coarse, fine, since, until = np.moveaxis(np.asarray(decays(jnp.asarray(g)), np.float64)[0, 0, 1], 0, 0)
    exact = np.cumsum(np.asarray(g[0, :, 1], np.float64))
    got = (coarse[:, None] - coarse) + (fine[:, None] - fine)
    assert np.abs(got - (exact[:, None] - exact)).max() < 1e-6
    np.testing.assert_allclose(since, np.exp(exact), rtol=1e-6, atol=1e-45)
    np.testing.assert_allclose(until, np.exp(exact[-1] - exact), rtol=1e-6, atol=1e-45)


@interpreted
def test_public_function():
    """By name, in a context, with its normaliser, under vmap and a scan; otherwise refused on a CPU."""
    arrays = make_inputs(3, 40, 2, 5, 4, decay="head", dtype="bfloat16", normalize=True, strength=0.3)

    def loss(arrays, name):
        def each(arrays):
            options = {"normalize": True, "implementation": name}
            y, state = linear_attention(**jax.tree.map(lambda x: x[None], arrays), **options)
            return (y.astype(jnp.float32) ** 2).sum() + (state**2).mean()

        return jax.lax.scan(lambda c, _: (c + jax.vmap(each)(arrays).sum(), None), 0.0, length=2)[0]

    with mosaic_gpu.interpret():
        got, grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(arrays, "pallas_gpu")
    exact = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    want, wanted = jax.jit(jax.value_and_grad(loss), static_argnums=1)(exact, "ref")
    assert rel_rms(got, want) < 1e-2
    for name in wanted:
        assert rel_rms(grads[name].astype(jnp.float32), wanted[name]) < 2e-2, name  # y is squared in bfloat16
    with pytest.raises(NotImplementedError, match="lowered for cpu"):
        linear_attention(**arrays, normalize=True, implementation="pallas_gpu")


@pytest.mark.parametrize(("decay", "widths"), [(None, (128, 128)), ("head", (128, 128)), ("head", (64, 65))])
def test_lowers_for_hopper(decay, widths):
    args = shapes(1, 1024, 2, *widths, decay=decay)
    text = lowered(lambda *args: linear_attention_gpu(*args), *args)
    assert "linear_attention_forward" in text
    text = lowered(grad_of(jax.checkpoint(lambda *args: linear_attention_gpu(*args))), *args)
    for name in ("linear_attention_forward", "linear_attention_backward_states", "linear_attention_backward"):
        assert name in text


@pytest.mark.parametrize(
    ("options", "widths", "kind", "match"),
    [
        ({"dtype": "float32"}, (64, 64), "NVIDIA H200", "bfloat16 or float16.*10 bits"),
        ({"decay": "channel"}, (64, 64), "NVIDIA H200", "one decay a head"),
        ({}, (128, 256), "NVIDIA H200", "KiB of shared memory"),
        ({}, (129, 64), "NVIDIA H200", "registers"),
        ({}, (64, 64), "NVIDIA A100-SXM4-80GB", "compute capability 9.0"),
    ],
)
def test_refusals(options, widths, kind, match):
    args = shapes(1, 128, 1, *widths, **options)
    with dispatch.target("cuda", kind), pytest.raises(NotImplementedError, match=match):
        jax.eval_shape(linear_attention_gpu, *args)
