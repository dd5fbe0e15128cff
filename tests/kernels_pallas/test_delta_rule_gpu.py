"""The GPU kernels of the delta rule: by interpretation against the reference, and lowered to a CUDA module."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import dispatch
from kernels_pallas.delta_rule.pallas_gpu import delta_rule_gpu
from kernels_pallas.delta_rule.ref import delta_rule_ref
from tests.kernels_pallas.gpu import grad_of, interpreted, lowered
from tests.kernels_pallas.test_delta_rule import make_inputs
from tests.numerics import rel_rms

NAMES = ("q", "k", "v", "beta", "log_decay", "state")


def check(arrays, mode=True):
    """Outputs and all gradients against the reference, which is given the same rounded inputs in float32."""

    def run(function, arrays):
        def loss(arrays):
            found = function(*(arrays.get(name) for name in NAMES))
            weights = (jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for x in found)
            return sum((x * w).sum() for x, w in zip(found, weights)), dict(zip(("y", "state"), found))

        (_, outputs), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        return outputs | {"d" + name: value for name, value in grads.items()}

    got = run(lambda *args: delta_rule_gpu(*args, interpret=mode), arrays)
    want = run(delta_rule_ref, {name: x.astype(jnp.float32) for name, x in arrays.items()})
    assert got["y"].dtype == arrays["v"].dtype
    for name in want:
        assert rel_rms(got[name].astype(jnp.float32), want[name]) < 1e-2, name


@interpreted
@pytest.mark.parametrize("decay", [None, 0.1, 30.0])
def test_matches_ref(decay):
    """Sizes that all differ, a length that does not divide, two blocks of values; products below 1e-30."""
    check(make_inputs(2, 101, 2, 5, 70, decay=decay, dtype="bfloat16"))


@interpreted
@pytest.mark.parametrize(("length", "decay"), [(1, None), (1, 0.1), (64, 0.1)])
def test_one_chunk(length, decay):
    """One token: its decay has a gradient of few terms that cancel, so many rows."""
    check(make_inputs(4 if length == 1 else 1, length, 4, 70, 5, decay=decay, dtype="bfloat16"))


@interpreted
def test_forgets():
    """exp of a sum over a chunk underflows and one token forgets by -inf: nothing is nan, no gradient goes past it."""
    arrays = make_inputs(1, 128, 1, 5, 7, decay=30.0, dtype="bfloat16")
    weak = arrays["log_decay"].at[:, 40:].multiply(1e-3)
    arrays["log_decay"] = weak.at[:, 70].set(-200.0)
    check(arrays)
    arrays["log_decay"] = weak.at[:, 70].set(-jnp.inf)
    late = lambda a: delta_rule_gpu(*(a[name] for name in NAMES), interpret=True)[0][:, 70:].astype(jnp.float32).sum()  # noqa: E731
    grads = jax.jit(jax.grad(late))(arrays)
    for name, x in grads.items():
        assert jnp.isfinite(x.astype(jnp.float32)).all(), name
    for name in ("q", "k", "v", "beta"):
        assert not grads[name][:, :70].any(), name
        assert grads[name][:, 70:].any(), name


@interpreted
@pytest.mark.parametrize("decay", [None, 0.1])
def test_under_vmap(decay):
    """The gradient's kernels fold what vmap adds into their batch axis."""
    arrays = make_inputs(2, 65, 1, 8, 8, decay=decay, dtype="bfloat16")

    def grads(function, arrays):
        def loss(a):
            y, state = function(*(None if a.get(name) is None else a[name][None] for name in NAMES))
            return y.astype(jnp.float32).sum() + (state * jnp.cos(state)).sum()

        return jax.jit(jax.vmap(jax.grad(loss)))(arrays)

    got = grads(lambda *args: delta_rule_gpu(*args, interpret=True), arrays)
    want = grads(delta_rule_ref, {name: x.astype(jnp.float32) for name, x in arrays.items()})
    for name in want:
        assert rel_rms(got[name].astype(jnp.float32), want[name]) < 1e-2, name


@interpreted
def test_four_chunks_without_a_race(capsys):
    """More chunks than stages, so that shared memory is used again."""
    mode = plgpu.InterpretGPUParams(detect_races=True)
    check(make_inputs(1, 256, 1, 64, 64, decay=0.1, dtype="bfloat16"), mode)
    assert "RACE" not in capsys.readouterr().out  # the detector itself only prints


@pytest.mark.parametrize("gated", [False, True])
def test_lowers_for_hopper(gated):
    rows = lambda *more: jax.ShapeDtypeStruct((1, 1024, 2, *more), "bfloat16")  # noqa: E731
    state = jax.ShapeDtypeStruct((1, 2, 128, 128), "float32")
    args = (rows(128), rows(128), rows(128), rows(), rows() if gated else None, state)
    assert "delta_rule_forward" in lowered(lambda *args: delta_rule_gpu(*args), *args)
    text = lowered(grad_of(jax.checkpoint(lambda *args: delta_rule_gpu(*args))), *args)
    for name in ("delta_rule_forward", "delta_rule_backward_states", "delta_rule_backward"):
        assert f"{name}_mosaic_gpu" in text


@pytest.mark.parametrize(
    ("dtype", "width", "deep", "kind", "match"),
    [
        ("float32", 64, 64, "NVIDIA H200", "bfloat16 or float16"),
        ("bfloat16", 129, 64, "NVIDIA H200", "registers"),
        ("bfloat16", 128, 256, "NVIDIA H200", "delta_rule_backward: .* KiB of shared memory"),
        ("bfloat16", 64, 64, "NVIDIA B200", "compute capability 9.0"),
    ],
)
def test_refusals(dtype, width, deep, kind, match):
    rows = lambda *more: jax.ShapeDtypeStruct((1, 64, 1, *more), dtype)  # noqa: E731
    args = (rows(width), rows(width), rows(deep), rows(), None, jax.ShapeDtypeStruct((1, 1, width, deep), "float32"))
    with dispatch.target("cuda", kind), pytest.raises(NotImplementedError, match=match):
        jax.eval_shape(delta_rule_gpu, *args)
