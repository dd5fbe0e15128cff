"""Every op under jax's transformations, through the public function, against the plain call."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import dispatch
from tests.kernels_pallas.op_cases import CASES, gradients
from tests.numerics import rel_rms

B, T, H, K = 2, 70, 2, 8


def close(got, want):
    return all(rel_rms(a, b) < 1e-5 for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
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


@pytest.mark.parametrize("length", [1, 33, 70])
def test_a_lone_sequence_as_two_halves_of_its_channels(length):
    """selective_scan on a CPU: as the same row twice, which is not cut."""
    case = CASES["selective_scan"]
    arrays = case.arrays(1, length, 16, 8)
    twice = [jnp.concatenate([x, x]) if letters[0] == "B" else x for x, letters in zip(arrays, case.axes)]
    got, want = gradients(case.function)(*arrays), gradients(case.function)(*twice)
    for x, y, letters in zip(got, want, ("BTD", *case.axes)):
        assert rel_rms(x, y[:1] if letters[0] == "B" else y / 2) < 1e-5
