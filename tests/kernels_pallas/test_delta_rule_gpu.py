"""The GPU kernel of the delta rule: by interpretation against the reference, and lowered to a CUDA module."""

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
    assert lowered(grad_of(lambda *args: delta_rule_gpu(*args)), *args)


@pytest.mark.parametrize(
    ("dtype", "width", "kind", "match"),
    [
        ("float32", 64, "NVIDIA H200", "bfloat16 or float16"),
        ("bfloat16", 512, "NVIDIA H200", "registers"),
        ("bfloat16", 64, "NVIDIA B200", "compute capability 9.0"),
    ],
)
def test_refusals(dtype, width, kind, match):
    rows = lambda *more: jax.ShapeDtypeStruct((1, 64, 1, *more), dtype)  # noqa: E731
    args = (rows(width), rows(width), rows(64), rows(), None, jax.ShapeDtypeStruct((1, 1, width, 64), "float32"))
    with dispatch.target("cuda", kind), pytest.raises(NotImplementedError, match=match):
        jax.eval_shape(delta_rule_gpu, *args)
