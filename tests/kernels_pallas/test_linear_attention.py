import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arch.ops.linear import global_linear_attention
from kernels_pallas import dispatch
from kernels_pallas.linear_attention import IMPLEMENTATIONS, linear_attention
from tests.numerics import rel_rms

EVERYWHERE = sorted(set(IMPLEMENTATIONS) - set(dispatch.KERNELS))  # the kernels have files of their own
OTHERS = sorted(set(EVERYWHERE) - {"ref"})


def make_inputs(B, T, H, K, V, *, decay=None, state=True, normalize=False, dtype="float32", strength=1.0, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    arrays = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, H, V)}
    if normalize:
        arrays["q"], arrays["k"] = jnp.abs(arrays["q"]) + 0.1, jnp.abs(arrays["k"]) + 0.1
    if decay is not None:
        shape = (B, T, H) if decay == "head" else (B, T, H, K)
        arrays["log_decay"] = jnp.asarray(-strength * rng.exponential(size=shape), dtype)
    if state:
        arrays["state"] = jnp.abs(jnp.asarray(rng.standard_normal((B, H, K, V + normalize)), "float32"))
    return arrays


def forward_and_grads(implementation, arrays, **options):
    def loss(arrays):
        y, state = linear_attention(**arrays, **options, implementation=implementation)
        weights = (jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for x in (y, state))
        return sum((x * w).sum() for x, w in zip((y, state), weights)), {"y": y, "state": state}

    (_, outputs), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return outputs | {"d" + name: value for name, value in grads.items()}


def by_loops(q, k, v, log_decay=None, state=None, normalize=False):
    """The definition in NumPy float64, with the sum of the keys kept on its own."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (B, T, H, K), V = q.shape, v.shape[-1]
    y, last = np.zeros(v.shape), np.zeros((B, H, K, V + normalize))
    for b in range(B):
        for h in range(H):
            S = np.zeros((K, V)) if state is None else np.asarray(state[b, h, :, :V], np.float64)
            z = np.zeros(K) if state is None or not normalize else np.asarray(state[b, h, :, V], np.float64)
            for t in range(T):
                g = np.zeros(1) if log_decay is None else np.atleast_1d(np.asarray(log_decay[b, t, h], np.float64))
                S = np.exp(g)[:, None] * S + np.outer(k[b, t, h], v[b, t, h])
                z = np.exp(g) * z + k[b, t, h]
                y[b, t, h] = q[b, t, h] @ S / (q[b, t, h] @ z if normalize else 1.0)
            last[b, h] = np.concatenate([S, z[:, None]], 1) if normalize else S
    return y, last


@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decay", [None, "head", "channel"])
def test_equals_the_definition(implementation, normalize, decay):
    arrays = make_inputs(2, 67, 3, 5, 4, decay=decay, normalize=normalize)
    y, state = linear_attention(**arrays, normalize=normalize, implementation=implementation)
    want_y, want_state = by_loops(**arrays, normalize=normalize)
    assert rel_rms(y, want_y) < 1e-5
    assert rel_rms(state, want_state) < 1e-5
    assert state.dtype == jnp.float32


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("decay", [None, "head", "channel"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 1, 3, 5, 4), {"state": True}),
        ((1, 63, 2, 8, 3), {"state": False}),
        ((3, 64, 2, 4, 5), {"strength": 0.01}),
        ((2, 101, 3, 5, 7), {"normalize": True}),
        ((1, 500, 2, 4, 6), {"strength": 30.0}),  # so strong that exp of a sum over a chunk underflows
    ],
)
def test_matches_ref(implementation, decay, shape, options):
    arrays = make_inputs(*shape, decay=decay, **options)
    normalize = options.get("normalize", False)
    got, want = (forward_and_grads(name, arrays, normalize=normalize) for name in (implementation, "ref"))
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-5, name


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_products_of_decays_to_1e_30(implementation, decay):
    """A stretch forgets by a factor of 1e-30 and the weak decays after it count as exactly as ever."""
    arrays = make_inputs(2, 150, 2, 6, 5, decay=decay, strength=0.05)
    arrays["log_decay"] = arrays["log_decay"].at[:, 40:44].add(float(np.log(1e-30)) / 4)
    got, want = (forward_and_grads(name, arrays) for name in (implementation, "ref"))
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-5, name
    assert rel_rms(got["y"][:, 44:], want["y"][:, 44:]) < 1e-5


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("decay", [None, "channel"])
def test_bfloat16(implementation, decay):
    arrays = make_inputs(2, 101, 3, 8, 7, decay=decay, dtype="bfloat16", normalize=True)
    got = forward_and_grads(implementation, arrays, normalize=True)
    want = forward_and_grads("ref", {n: x.astype(jnp.float32) for n, x in arrays.items()}, normalize=True)
    assert got["y"].dtype == jnp.bfloat16
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-2, name


@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_weak_decay_after_a_reset(implementation, decay):
    """-inf forgets everything before, and what follows is as exact as in a fresh sequence."""
    arrays = make_inputs(1, 90, 2, 5, 4, decay=decay, strength=0.1)
    reset = arrays | {"log_decay": arrays["log_decay"].at[:, jnp.array([20, 37])].set(-jnp.inf)}
    got, state = linear_attention(**reset, implementation=implementation)
    fresh = {name: x[:, 37:] for name, x in arrays.items() if name != "state"}
    want_y, want_state = by_loops(**fresh)
    assert rel_rms(got[:, 37:], want_y) < 1e-5
    assert rel_rms(state, want_state) < 1e-5
    grads = forward_and_grads(implementation, reset)
    assert all(np.isfinite(value).all() for value in grads.values())


@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.parametrize("normalize", [False, True])
def test_two_halves_equal_the_whole(implementation, normalize):
    arrays = make_inputs(2, 100, 2, 5, 4, decay="head", normalize=normalize)
    state, parts = arrays.pop("state"), []
    whole, last = linear_attention(**arrays, state=state, normalize=normalize, implementation=implementation)
    for part in (slice(0, 33), slice(33, 100)):
        half = {name: x[:, part] for name, x in arrays.items()}
        y, state = linear_attention(**half, state=state, normalize=normalize, implementation=implementation)
        parts.append(y)
    assert rel_rms(jnp.concatenate(parts, 1), whole) < 1e-5
    assert rel_rms(state, last) < 1e-5


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_padding_gives_zero(implementation):
    arrays = make_inputs(2, 20, 2, 5, 4, normalize=True, state=False)
    arrays["k"] = arrays["k"].at[0].set(0.0)
    got = forward_and_grads(implementation, arrays, normalize=True)
    assert not np.asarray(got["y"][0]).any()
    assert all(np.isfinite(value).all() for value in got.values())


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_empty(implementation):
    arrays = make_inputs(2, 0, 2, 5, 4)
    y, state = linear_attention(**arrays, implementation=implementation)
    assert y.shape == (2, 0, 2, 4)
    assert np.array_equal(state, arrays["state"])


def test_state_needs_its_normaliser():
    arrays = make_inputs(1, 4, 2, 5, 4)
    with pytest.raises(ValueError, match="sum of the keys"):
        linear_attention(**arrays, normalize=True)


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_global_form_equals_the_last_token(implementation):
    arrays = make_inputs(2, 30, 3, 5, 4, normalize=True, state=False)
    keep = jnp.asarray(np.random.default_rng(1).random((2, 30)) < 0.6).at[1].set(False)
    got = global_linear_attention(**arrays, keep=keep)
    masked = arrays | {"k": arrays["k"] * keep[:, :, None, None]}
    want, _ = linear_attention(**masked, normalize=True, implementation=implementation)
    assert rel_rms(got[:, -1], want[:, -1]) < 1e-5
    assert not np.asarray(got[1]).any()
