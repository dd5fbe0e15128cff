import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.dispatch import KERNELS
from kernels_pallas.selective_scan import IMPLEMENTATIONS, selective_scan
from kernels_pallas.selective_scan.chunked import selective_scan_chunked
from tests.numerics import rel_rms

FORMS = sorted(set(IMPLEMENTATIONS) - set(KERNELS))  # kernels have their own tests
OTHERS = sorted(set(FORMS) - {"ref"})


def make_inputs(B, T, D, N, *, state=True, reset=False, dtype="float32", strength=1.0, seed=0):
    """Steps around `strength`, rates from -1 to -N as Mamba starts with."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    arrays = {"u": normal(B, T, D), "B": normal(B, T, N), "C": normal(B, T, N), "D": normal(D)}
    arrays["delta"] = jnp.asarray(strength * rng.exponential(size=(B, T, D)), dtype)
    arrays["A"] = jnp.asarray(-(1 + np.arange(N) + rng.random((D, N))), "float32")
    if state:
        arrays["state"] = jnp.asarray(rng.standard_normal((B, D, N)), "float32")
    if reset:
        arrays["reset"] = jnp.asarray(rng.random((B, T)) < 0.1)
    return arrays


def forward_and_grads(function, arrays):
    """Outputs and gradients of everything of a function or of the implementation of that name."""
    masks = {name: x for name, x in arrays.items() if x.dtype == bool}
    call = function if callable(function) else lambda **a: selective_scan(**a, implementation=function)

    def loss(arrays):
        y, state = call(**arrays, **masks)
        weights = (jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for x in (y, state))
        return sum((x * w).sum() for x, w in zip((y, state), weights)), {"y": y, "state": state}

    inputs = {name: x for name, x in arrays.items() if name not in masks}
    (_, outputs), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
    return outputs | {"d" + name: value for name, value in grads.items()}


def by_loops(u, delta, A, B, C, D=None, state=None, reset=None):
    """The definition in NumPy float64, a channel at a time."""
    u, delta, A, B, C = (np.asarray(x, np.float64) for x in (u, delta, A, B, C))
    y, last = np.zeros(u.shape), np.zeros((*u.shape[::2], A.shape[1]))
    for b, d in np.ndindex(last.shape[:2]):
        h = np.zeros(A.shape[1]) if state is None else np.asarray(state[b, d], np.float64)
        for t in range(u.shape[1]):
            if reset is not None and reset[b, t]:
                h = np.zeros(A.shape[1])
            h = np.exp(delta[b, t, d] * A[d]) * h + delta[b, t, d] * B[b, t] * u[b, t, d]
            y[b, t, d] = C[b, t] @ h + (0 if D is None else float(D[d]) * u[b, t, d])
        last[b, d] = h
    return y, last


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("options", [{}, {"strength": 1e-3, "state": False}, {"reset": True}])
def test_equals_the_definition(implementation, options):
    arrays = make_inputs(2, 67, 5, 3, **options)
    y, state = selective_scan(**arrays, implementation=implementation)
    want_y, want_state = by_loops(**arrays)
    assert rel_rms(y, want_y) < 1e-5
    assert rel_rms(state, want_state) < 1e-5
    assert state.dtype == jnp.float32


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 1, 5, 3), {}),
        ((3, 63, 7, 4), {"state": False, "strength": 1e-3}),
        ((2, 64, 5, 3), {"reset": True}),
        ((1, 101, 6, 5), {"strength": 0.1}),
        ((2, 500, 4, 3), {"strength": 10.0}),  # the decay over a chunk underflows to 0
        ((2, 500, 3, 2), {"strength": 1e-4, "reset": True}),  # nearly no decay
    ],
)
def test_matches_ref(implementation, shape, options):
    arrays = make_inputs(*shape, **options)
    got, want = (forward_and_grads(name, arrays) for name in (implementation, "ref"))
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-5, name


@pytest.mark.parametrize(("chunk", "parallel"), [(1, 1), (7, 1), (7, 3), (16, 2), (32, 3), (32, 50)])
def test_any_chunks(chunk, parallel):
    """One block or several, chunks in order or side by side, the last of each partly empty."""
    arrays = make_inputs(2, 101, 5, 3, reset=True)
    del arrays["D"]
    run = lambda **a: selective_scan_chunked(**a, chunk=chunk, parallel=parallel)  # noqa: E731
    got, want = forward_and_grads(run, arrays), forward_and_grads("ref", arrays)
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-5, name


@pytest.mark.parametrize("implementation", FORMS)
def test_bfloat16(implementation):
    arrays = make_inputs(2, 101, 8, 7, dtype="bfloat16", strength=0.1)
    got = forward_and_grads(implementation, arrays)
    want = forward_and_grads("ref", {name: x.astype(jnp.float32) for name, x in arrays.items()})
    assert got["y"].dtype == jnp.bfloat16
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-2, name


@pytest.mark.parametrize("implementation", FORMS)
def test_gradient_by_differences(implementation):
    """Against central differences of the definition in float64, along one random direction of each input."""
    arrays = make_inputs(2, 23, 3, 2, strength=0.3)
    got = forward_and_grads(implementation, arrays)
    rng = np.random.default_rng(1)
    exact = {name: np.asarray(x, np.float64) for name, x in arrays.items()}

    def loss(arrays):
        return sum((x * np.cos(np.arange(x.size)).reshape(x.shape)).sum() for x in by_loops(**arrays))

    for name, x in exact.items():
        direction = rng.standard_normal(x.shape)
        ends = [loss(exact | {name: x + step * direction}) for step in (1e-6, -1e-6)]
        want = (ends[0] - ends[1]) / 2e-6
        assert abs((got["d" + name] * direction).sum() - want) < 1e-4 * abs(want) + 1e-4, name


@pytest.mark.parametrize("implementation", FORMS)
def test_weak_decay_after_a_strong_one(implementation):
    """A step so large that all before is forgotten (exp(-1000) is 0), then weak decay, as exact as a fresh start."""
    arrays = make_inputs(1, 90, 4, 3, strength=1e-3)
    arrays["delta"] = arrays["delta"].at[:, jnp.array([20, 37])].set(1e3)
    got, last = selective_scan(**arrays, implementation=implementation)
    want, want_last = by_loops(**arrays)
    assert rel_rms(got[:, 38:], want[:, 38:]) < 1e-5
    assert rel_rms(last, want_last) < 1e-5
    grads = forward_and_grads(implementation, arrays)
    assert all(np.isfinite(value).all() for value in grads.values())


@pytest.mark.parametrize("implementation", FORMS)
def test_a_reset_starts_afresh(implementation):
    arrays = make_inputs(2, 60, 4, 3, strength=0.01)
    reset = jnp.zeros((2, 60), bool).at[0, 37].set(True).at[1, 0].set(True)
    y, state = selective_scan(**arrays, reset=reset, implementation=implementation)
    fresh = {name: x if name in "AD" else x[:1, 37:] for name, x in arrays.items() if name != "state"}
    want, want_state = by_loops(**fresh)
    assert rel_rms(y[:1, 37:], want) < 1e-5
    assert rel_rms(state[:1], want_state) < 1e-5
    gradient = jax.grad(
        lambda s: selective_scan(**arrays | {"state": s}, reset=reset, implementation=implementation)[0][1].sum()
    )(arrays["state"])
    assert not np.asarray(gradient).any()  # a reset before the first token forgets the given state


@pytest.mark.parametrize("implementation", FORMS)
def test_two_halves_equal_the_whole(implementation):
    arrays = make_inputs(2, 100, 5, 3, strength=0.1)
    state, parts = arrays.pop("state"), []
    whole, last = selective_scan(**arrays, state=state, implementation=implementation)
    for part in (slice(0, 33), slice(33, 100)):
        half = {name: x if name in "AD" else x[:, part] for name, x in arrays.items()}
        y, state = selective_scan(**half, state=state, implementation=implementation)
        parts.append(y)
    assert rel_rms(jnp.concatenate(parts, 1), whole) < 1e-5
    assert rel_rms(state, last) < 1e-5


@pytest.mark.parametrize("implementation", FORMS)
def test_padding_is_inert(implementation):
    """delta = 0 leaves the state as it is; a row of nothing else keeps the given state to the bit."""
    arrays = make_inputs(2, 40, 5, 3)
    arrays["delta"] = arrays["delta"].at[0].set(0.0).at[1, 11:29].set(0.0)
    _, state = selective_scan(**arrays, implementation=implementation)
    np.testing.assert_array_equal(state[0], arrays["state"][0])
    kept = np.r_[:11, 29:40]
    short = {name: x if name in "AD" else x[1:] if name == "state" else x[1:, kept] for name, x in arrays.items()}
    assert rel_rms(state[1:], by_loops(**short)[1]) < 1e-5
    assert all(np.isfinite(value).all() for value in forward_and_grads(implementation, arrays).values())


@pytest.mark.parametrize("implementation", FORMS)
def test_empty(implementation):
    arrays = make_inputs(2, 0, 5, 3)
    y, state = selective_scan(**arrays, implementation=implementation)
    assert y.shape == (2, 0, 5)
    np.testing.assert_array_equal(state, arrays["state"])


@pytest.mark.parametrize("name", ["delta", "A", "B", "C", "D", "state", "reset"])
def test_shapes_that_do_not_fit(name):
    arrays = make_inputs(2, 4, 5, 3, reset=True)
    unchecked = inspect.unwrap(selective_scan)  # a user's call is not checked by beartype
    with pytest.raises(ValueError, match="selective_scan"):
        unchecked(**arrays | {name: jnp.concatenate([arrays[name]] * 2, -1)})


def test_memory_is_linear_and_small():
    """Never an array [B T D N]: forward and backward take less than a quarter of one, and grow as T does."""
    B, D, N = 1, 128, 32

    def temporary(T):
        loss = lambda u, delta, A, B, C: (selective_scan(u, delta, A, B, C)[0] ** 2).sum()  # noqa: E731
        shapes = [(B, T, D), (B, T, D), (D, N), (B, T, N), (B, T, N)]
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(2048), temporary(4096)
    assert long < 0.25 * 4 * B * 4096 * D * N
    assert long < 2.2 * short
