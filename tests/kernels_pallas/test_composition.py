"""Every op under jax's transformations, through the public function, against the plain call."""

import jax
import jax.numpy as jnp
import pytest
from jax import export

from kernels_pallas import dispatch
from kernels_pallas.attention import api as attention
from kernels_pallas.delta_rule import api as delta_rule
from kernels_pallas.linear_attention import api as linear_attention
from kernels_pallas.linear_recurrence import api as linear_recurrence
from kernels_pallas.long_conv import api as long_conv
from kernels_pallas.selective_scan import api as selective_scan
from tests.kernels_pallas.op_cases import CASES, gradients
from tests.numerics import rel_rms

TABLES = {
    "attention": attention,
    "delta_rule": delta_rule,
    "linear_attention": linear_attention,
    "linear_recurrence": linear_recurrence,
    "long_conv": long_conv,
    "selective_scan": selective_scan,
}
B, T, H, K = 2, 70, 2, 8
OPS = {name: next(op for op in TABLES if name.startswith(op)) for name in CASES}
KERNELS = {name for name, op in OPS.items() if "pallas_tpu" in TABLES[op].AUTO.get("tpu", ())}


def close(got, want):
    return all(rel_rms(a, b) < 1e-5 for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_jit_remat_scan_and_unknown_platform(name, monkeypatch):
    case = CASES[name]
    arrays = case.arrays(B, T, H, K)
    want = gradients(case.function)(*arrays)
    assert close(jax.jit(gradients(jax.checkpoint(case.function)))(*arrays), want)

    def scanned(*arrays):  # over the batch, a row a step, recomputed in the backward pass
        cut = [letters[0] == "B" for letters in case.axes]
        rows = [x[:, None] for x, each in zip(arrays, cut) if each]

        def step(carry, row):
            row = iter(row)
            return carry, case.function(*(next(row) if each else x for x, each in zip(arrays, cut)))

        return jax.lax.scan(jax.checkpoint(step), 0, rows)[1][:, 0]

    monkeypatch.delenv("ARCHLOOM_PLATFORM")  # no mesh either: the platform is settled when lowering
    assert dispatch.platform() is None
    assert close(jax.jit(gradients(scanned))(*arrays), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_vmap(name):
    case = CASES[name]
    arrays = case.arrays(B, T, H, K)
    many = [jnp.stack([x, x / 2, -x if n not in case.small else x / 3]) for n, x in enumerate(arrays)]
    run = gradients(case.function)
    got = jax.jit(jax.vmap(run))(*many)
    alone = jax.jit(jax.vmap(run, in_axes=(0, *(None,) * (len(arrays) - 1))))(many[0], *arrays[1:])
    plain = jax.jit(run)
    for n in range(3):
        assert close([x[n] for x in got], plain(*(x[n] for x in many)))
        assert close([x[n] for x in alone], plain(many[0][n], *arrays[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_program_for_another_platform_has_its_kernels(name, monkeypatch):
    """Lowered on this machine: kernels in the program for a TPU, none in that for a CPU, from one trace."""
    monkeypatch.delenv("ARCHLOOM_PLATFORM")
    case = CASES[name]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in case.shapes(2, 256, 2, 128)]
    traced = jax.jit(gradients(case.function)).trace(*shapes)
    has = {each: "tpu_custom_call" in traced.lower(lowering_platforms=(each,)).as_text() for each in ("tpu", "cpu")}
    assert has == {"tpu": name in KERNELS, "cpu": False}
    for each in has:  # one by one: jax lowers a kernel for a CPU too where both are asked for, and fails
        exported = export.export(
            jax.jit(case.function),
            platforms=(each,),
            disabled_checks=[export.DisabledSafetyCheck.custom_call("tpu_custom_call")],
        )(*shapes)
        assert ("tpu_custom_call" in exported.mlir_module()) == has[each]


@pytest.mark.parametrize("length", [1, 33, 70])
def test_a_lone_sequence_as_two_halves_of_its_channels(length):
    """selective_scan on a CPU: as the same row twice, which is not cut."""
    case = CASES["selective_scan"]
    arrays = case.arrays(1, length, 16, 8)
    twice = [jnp.concatenate([x, x]) if letters[0] == "B" else x for x, letters in zip(arrays, case.axes)]
    got, want = gradients(case.function)(*arrays), gradients(case.function)(*twice)
    for x, y, letters in zip(got, want, ("BTD", *case.axes)):
        assert rel_rms(x, y[:1] if letters[0] == "B" else y / 2) < 1e-5
