import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import dispatch
from kernels_pallas.delta_rule import IMPLEMENTATIONS, delta_rule
from kernels_pallas.delta_rule.chunked import _solve, delta_rule_chunked
from tests.numerics import rel_rms

EVERYWHERE = sorted(set(IMPLEMENTATIONS) - set(dispatch.KERNELS))  # the kernels have files of their own
OTHERS = sorted(set(EVERYWHERE) - {"ref"})
DECAYS = [None, 0.1, 30.0]  # none, weak, so strong that exp of a sum over a chunk underflows


def make_inputs(B, T, H, K, V, *, decay=None, state=True, dtype="float32", largest=1.0, alike=0.0, seed=0):
    """Keys of length 1 with mean cosine alike^2 / (1 + alike^2), beta uniform up to `largest`."""
    rng = np.random.default_rng(seed)
    k = rng.standard_normal((B, T, H, K)) + alike * rng.standard_normal((B, 1, H, K))
    arrays = {
        "q": rng.standard_normal((B, T, H, K)),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.standard_normal((B, T, H, V)),
        "beta": largest * rng.random((B, T, H)),
    }
    if decay is not None:
        arrays["log_decay"] = -decay * rng.exponential(size=(B, T, H))
    arrays = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
    if state:
        arrays["state"] = jnp.asarray(rng.standard_normal((B, H, K, V)), "float32")
    return arrays


@functools.partial(jax.jit, static_argnums=0)
def forward(implementation, arrays):
    return delta_rule(**arrays, implementation=implementation)


@functools.partial(jax.jit, static_argnums=0)
def forward_and_grads(implementation, arrays):
    def loss(arrays):
        y, state = delta_rule(**arrays, implementation=implementation)
        weights = (jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for x in (y, state))
        return sum((x * w).sum() for x, w in zip((y, state), weights)), {"y": y, "state": state}

    (_, outputs), grads = jax.value_and_grad(loss, has_aux=True)(arrays)
    return outputs | {"d" + name: value for name, value in grads.items()}


def by_loops(q, k, v, beta, log_decay=None, state=None):
    """The papers' equation in NumPy float64, in their orientation: S [V K]."""
    q, k, v, beta = (np.asarray(x, np.float64) for x in (q, k, v, beta))
    (B, T, H, K), V = q.shape, v.shape[-1]
    y, last = np.zeros(v.shape), np.zeros((B, H, K, V))
    for b in range(B):
        for h in range(H):
            S = np.zeros((V, K)) if state is None else np.asarray(state[b, h], np.float64).T
            for t in range(T):
                alpha = 1.0 if log_decay is None else np.exp(np.float64(log_decay[b, t, h]))
                k_t, v_t, beta_t = k[b, t, h], v[b, t, h], beta[b, t, h]
                S = S @ (alpha * (np.eye(K) - beta_t * np.outer(k_t, k_t))) + beta_t * np.outer(v_t, k_t)
                y[b, t, h] = S @ q[b, t, h]
            last[b, h] = S.T
    return y, last


@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("state", [False, True])
def test_equals_the_definition(implementation, decay, state):
    arrays = make_inputs(2, 67, 3, 5, 4, decay=decay, state=state, largest=2.0)
    y, last = forward(implementation, arrays)
    want_y, want_last = by_loops(**arrays)
    assert rel_rms(y, want_y) < 1e-5
    assert rel_rms(last, want_last) < 1e-5
    assert last.dtype == jnp.float32


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 1, 3, 5, 4), {}),
        ((1, 63, 2, 8, 3), {"state": False}),
        ((2, 64, 1, 3, 6), {"largest": 2.0, "alike": 3.0}),  # reflections along keys of mean cosine 0.9
        ((2, 101, 3, 5, 7), {"alike": 1.0}),
        ((1, 500, 2, 16, 6), {"largest": 2.0, "alike": 3.0}),
    ],
)
def test_matches_ref(implementation, decay, shape, options):
    arrays = make_inputs(*shape, decay=decay, **options)
    got, want = (forward_and_grads(name, arrays) for name in (implementation, "ref"))
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-5, name


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("decay", [None, 0.1])
def test_bfloat16(implementation, decay):
    arrays = make_inputs(2, 101, 3, 8, 7, decay=decay, dtype="bfloat16")
    got = forward_and_grads(implementation, arrays)
    want = forward_and_grads("ref", {name: x.astype(jnp.float32) for name, x in arrays.items()})
    assert got["y"].dtype == got["dq"].dtype == got["dbeta"].dtype == jnp.bfloat16
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-2, name


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_forgets_exactly(implementation):
    """-inf forgets everything before, and what follows is as exact as in a fresh sequence."""
    arrays = make_inputs(1, 90, 2, 5, 4, decay=0.1)
    reset = arrays | {"log_decay": arrays["log_decay"].at[:, jnp.array([20, 37])].set(-jnp.inf)}
    got, state = forward(implementation, reset)
    want_y, want_state = by_loops(**{name: x[:, 37:] for name, x in arrays.items() if name != "state"})
    assert rel_rms(got[:, 37:], want_y) < 1e-5
    assert rel_rms(state, want_state) < 1e-5
    other = reset | {name: reset[name].at[:, :37].add(1.0) for name in ("k", "v")}
    np.testing.assert_array_equal(forward(implementation, other)[0][:, 37:], got[:, 37:])
    grads = forward_and_grads(implementation, reset)
    assert all(np.isfinite(value).all() for value in grads.values())
    want = forward_and_grads("ref", reset)
    assert rel_rms(grads["dlog_decay"], want["dlog_decay"]) < 1e-5


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_two_halves_equal_the_whole(implementation):
    arrays = make_inputs(2, 100, 2, 5, 4, decay=0.1)
    state, parts = arrays.pop("state"), []
    whole, last = forward(implementation, arrays | {"state": state})
    for part in (slice(0, 33), slice(33, 100)):
        y, state = forward(implementation, {name: x[:, part] for name, x in arrays.items()} | {"state": state})
        parts.append(y)
    assert rel_rms(jnp.concatenate(parts, 1), whole) < 1e-5
    assert rel_rms(state, last) < 1e-5


@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.parametrize("name", ["beta", "k"])
def test_padding_writes_nothing(implementation, name):
    """beta = 0 or k = 0 in front, between and behind, and through a whole row."""
    arrays = make_inputs(2, 80, 2, 5, 4)
    keep = np.random.default_rng(1).random(80) < 0.6
    keep[[0, 79]] = False
    masked = arrays | {name: arrays[name].at[0, ~keep].set(0.0).at[1].set(0.0)}
    y, last = forward(implementation, masked)
    kept = {n: x[:1] if n == "state" else x[:1, keep] for n, x in arrays.items()}
    want_y, want_last = by_loops(**kept)
    assert rel_rms(y[:1, keep], want_y) < 1e-5
    assert rel_rms(last[:1], want_last) < 1e-5
    np.testing.assert_array_equal(last[1], arrays["state"][1])
    got, want = (forward_and_grads(n, masked) for n in (implementation, "ref"))
    for output in want:
        assert rel_rms(got[output], want[output]) < 1e-5, output


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_empty(implementation):
    arrays = make_inputs(2, 0, 2, 5, 4, decay=1.0)
    got = forward_and_grads(implementation, arrays)
    assert got["y"].shape == (2, 0, 2, 4)
    np.testing.assert_array_equal(got["state"], arrays["state"])


def test_overwrites():
    """With beta = 1 a key of length 1 then reads what was last written under it; linear attention's sum cannot."""
    k = jnp.eye(4)[jnp.array([0, 1, 0, 2, 0])][None, :, None]
    v = jnp.arange(1.0, 6.0)[None, :, None, None]
    y, state = delta_rule(k, k, v, jnp.ones((1, 5, 1)))
    np.testing.assert_allclose(y[0, :, 0, 0], [1.0, 2.0, 3.0, 4.0, 5.0], atol=1e-6)
    np.testing.assert_allclose(state[0, 0, :, 0], [5.0, 2.0, 4.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 8, 16, 128])
def test_chunk_lengths_agree(chunk):
    arrays = make_inputs(1, 150, 2, 5, 4, decay=0.1)
    y, last = jax.jit(functools.partial(delta_rule_chunked, chunk=chunk))(*arrays.values())
    want_y, want_last = forward("ref", arrays)
    assert rel_rms(y, want_y) < 1e-5
    assert rel_rms(last, want_last) < 1e-5


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_solve(size):
    """Where a series of powers would pass 2^64: keys all alike and beta = 2."""
    a = np.tril(np.full((size, size), 2.0), -1)
    b = np.random.default_rng(0).standard_normal((size, 3))
    inverse = np.linalg.inv(np.eye(size) + a)
    (x,), pull = jax.vjp(jax.jit(_solve), jnp.asarray(a, jnp.float32), (jnp.asarray(b, jnp.float32),))
    assert rel_rms(x, inverse @ b) < 1e-5
    da, (db,) = pull((jnp.ones((size, 3)),))
    assert rel_rms(db, inverse.T @ np.ones((size, 3))) < 1e-5
    assert rel_rms(da, -np.tril(inverse.T @ np.ones((size, 3)) @ (inverse @ b).T, -1)) < 1e-5


def test_memory_of_the_backward_pass_is_linear():
    """Kept between the passes: the inputs and one state a chunk of 64, not a state a token."""
    arrays = make_inputs(1, 1024, 2, 16, 16)

    def kept(length):
        given = {name: x if name == "state" else x[:, :length] for name, x in arrays.items()}
        shapes = jax.eval_shape(lambda a: jax.vjp(lambda a: delta_rule(**a), a)[1], given)
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    assert kept(1024) < 2.1 * kept(512)
    assert kept(1024) < 1.5 * sum(x.size for x in arrays.values()) + 16 * arrays["state"].size


@pytest.mark.parametrize(
    ("name", "shape"),
    [("v", (1, 4, 3, 4)), ("k", (1, 4, 2, 4)), ("beta", (1, 4)), ("log_decay", (1, 4, 2, 5)), ("state", (1, 2, 4, 5))],
)
def test_shapes_that_do_not_fit(name, shape):
    arrays = make_inputs(1, 4, 2, 5, 4, decay=1.0)
    with pytest.raises(Exception, match=name):  # beartype's error where it sees the shape first, else ValueError
        delta_rule(**arrays | {name: jnp.zeros(shape)})
