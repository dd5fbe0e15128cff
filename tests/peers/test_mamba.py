"""mamba, mamba2 and the selective scan against the transformers library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import arch.mixers  # noqa: F401
from arch.registry import MIXERS
from kernels_pallas import dispatch
from kernels_pallas.selective_scan import IMPLEMENTATIONS, selective_scan
from tests.numerics import rel_rms
from tests.peers.harness import peer

pytestmark = pytest.mark.peers

OPTIONS = {"mamba": {"state_size": 5}, "mamba2": {"state_size": 5, "head_dim": 8, "groups": 2}}


def taken_over(kind, arrays):
    """Our mixer with the weights of transformers'. Its Linear kernels are [out in], its convolution's oldest first."""
    w = {name.removeprefix("w/"): value for name, value in arrays.items() if name.startswith("w/")}
    mixer = MIXERS.build(
        {"kind": kind, **OPTIONS[kind]}, key="kind", width=24, causal=True, max_length=37, rngs=nnx.Rngs(0)
    )
    theirs = {
        "inputs.kernel": w.pop("in_proj.weight").T,
        "conv.kernel": w.pop("conv1d.weight")[:, 0].T[::-1],
        "conv.bias": w.pop("conv1d.bias"),
        "A_log": w.pop("A_log"),
        "D": w.pop("D"),
        "out.kernel": w.pop("out_proj.weight").T,
    }
    if kind == "mamba":
        theirs |= {
            "select.kernel": w.pop("x_proj.weight").T,
            "steps": w.pop("dt_proj.weight").T,
            "steps_bias": w.pop("dt_proj.bias"),
        }
    else:
        theirs |= {"steps_bias": w.pop("dt_bias"), "norm.scale": w.pop("norm.weight").reshape(2, 24)}
    assert not w
    graph, state = nnx.split(mixer)
    flat = dict(nnx.to_flat_state(state))
    ours = {".".join(path) for path in flat}
    assert ours == set(theirs)
    for path, param in flat.items():
        value = jnp.asarray(theirs[".".join(path)])
        assert param[...].shape == value.shape
        param[...] = value
    return nnx.merge(graph, nnx.from_flat_state(flat))


@pytest.mark.parametrize("kind", sorted(OPTIONS))
def test_mixer(kind, tmp_path):
    arrays = peer("mamba", tmp_path, kind, needs=("torch", "transformers"))
    mixer = taken_over(kind, arrays)
    y, backward = jax.vjp(mixer, jnp.asarray(arrays["x"]))
    assert rel_rms(y, arrays["y"]) < 1e-4
    assert rel_rms(backward(jnp.asarray(arrays["dy"]))[0], arrays["dx"]) < 1e-4


@pytest.mark.parametrize("implementation", sorted(set(IMPLEMENTATIONS) - set(dispatch.KERNELS)))
def test_scan(implementation, tmp_path):
    arrays = peer("mamba_scan", tmp_path, needs=("torch", "transformers"))
    inputs = {name: jnp.asarray(arrays[name]) for name in ("u", "delta", "A", "B", "C", "D")}
    (y, state), backward = jax.vjp(lambda a: selective_scan(**a, implementation=implementation), inputs)
    (grads,) = backward((jnp.asarray(arrays["dy"]), jnp.zeros_like(state)))
    assert rel_rms(y, arrays["y"]) < 1e-5
    assert rel_rms(state, arrays["state"]) < 1e-5
    for name, gradient in grads.items():
        assert rel_rms(gradient, np.asarray(arrays["d" + name])) < 1e-5, name
