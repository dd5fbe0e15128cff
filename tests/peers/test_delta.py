"""The delta rule and its mixers against flash-linear-attention's naive functions and transformers' Qwen3-Next layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arch.mixers.delta_net import DeltaNet
from arch.mixers.gated_delta import GatedDelta
from kernels_pallas import dispatch
from kernels_pallas.delta_rule import IMPLEMENTATIONS, delta_rule
from tests.numerics import rel_rms
from tests.peers.harness import peer

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def naive(tmp_path_factory):
    return peer("delta_rule", tmp_path_factory.mktemp("delta_rule"), needs=("torch", "fla", "einops"))


@pytest.mark.parametrize("implementation", sorted(set(IMPLEMENTATIONS) - set(dispatch.KERNELS)))
@pytest.mark.parametrize("name", ["plain", "gated", "gated_chunk"])
def test_naive_functions(implementation, name, naive):
    """fla scales q by K^-1/2 inside; ours leaves q to the caller."""
    inputs = {n: jnp.asarray(naive[n]) for n in ("q", "k", "v", "beta", "state")}
    if name != "plain":
        inputs["log_decay"] = jnp.asarray(naive["log_decay"])

    @jax.jit
    def run(inputs):
        scaled = inputs | {"q": inputs["q"] * inputs["q"].shape[-1] ** -0.5}
        return delta_rule(**scaled, implementation=implementation)

    (y, last), pull = jax.vjp(run, inputs)
    (grads,) = pull((jnp.asarray(naive["dy"]), jnp.asarray(naive["dstate"])))
    assert rel_rms(y, naive[f"{name}/y"]) < 1e-5
    assert rel_rms(last, naive[f"{name}/last"]) < 1e-5
    for n, gradient in grads.items():
        assert rel_rms(gradient, naive[f"{name}/d{n}"]) < 1e-4, n


@pytest.mark.parametrize("name", ["gated_delta", "delta_net"])
def test_qwen3_next_layer(name, tmp_path):
    """Output and gradient of transformers' layer, by gated_delta and by delta_net with the same options."""
    peers = peer("delta_qwen3_next", tmp_path, needs=("torch", "transformers"))
    H, K, V, D = 3, 8, 16, 24
    common = {"causal": True, "num_heads": H, "head_dim": K, "rngs": nnx.Rngs(0)}
    options = {"value_dim": V, "decay_gate": True, "output_gate": True}
    mixer = GatedDelta(D, **common) if name == "gated_delta" else DeltaNet(D, **common, **options)
    # Its rows are grouped by head: q, k, v and gate of one, then of the next; beta and decay likewise.
    q, k, v, gate = np.split(peers["w/in_proj_qkvz.weight"].reshape(H, 2 * K + 2 * V, D), [K, 2 * K, 2 * K + V], axis=1)
    beta, decay = peers["w/in_proj_ba.weight"].reshape(H, 2, D).swapaxes(0, 1)
    weights = [
        (mixer.qkv.kernel, np.concatenate([part.reshape(-1, D) for part in (q, k, v)]).T),
        (mixer.gate.kernel, gate.reshape(-1, D).T),
        (mixer.beta.kernel, beta.T),
        (mixer.decay.project.kernel, decay.T),
        (mixer.decay.exact.A_log, peers["w/A_log"]),
        (mixer.decay.exact.dt_bias, peers["w/dt_bias"]),
        (mixer.conv.kernel, peers["w/conv1d.weight"][:, 0, ::-1].T),  # theirs has the oldest token first
        (mixer.norm.scale, np.tile(peers["w/norm.weight"], (H, 1))),  # theirs is shared by the heads
        (mixer.out.kernel, peers["w/out_proj.weight"].T),
    ]
    for param, value in weights:
        assert param.shape == value.shape
        param[...] = jnp.asarray(value)
    y, pull = jax.vjp(jax.jit(mixer), jnp.asarray(peers["x"]))
    assert rel_rms(y, peers["y"]) < 1e-5
    assert rel_rms(pull(jnp.asarray(peers["dy"]))[0], peers["dx"]) < 1e-4
