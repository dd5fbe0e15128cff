import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.dispatch import KERNELS
from kernels_pallas.linear_recurrence import AUTO, IMPLEMENTATIONS, linear_recurrence
from tests.numerics import rel_rms

FORMS = sorted(set(IMPLEMENTATIONS) - set(KERNELS))  # kernels have their own tests
OTHERS = sorted(set(FORMS) - {"ref"})
KINDS = ["real", "complex", "constant", "constant complex"]
FEWER = [  # the other two in the full suite
    pytest.param(kind, marks=[] if kind in ("real", "constant complex") else pytest.mark.exhaustive) for kind in KINDS
]


def make_inputs(B, T, D, *, kind="real", state=True, strength=1.0, dtype="float32", seed=0):
    """|a| = exp(-strength E) with E exponential: strength 0 keeps all, 30 underflows within a few tokens."""
    rng = np.random.default_rng(seed)
    is_complex = "complex" in kind

    def normal(*shape):
        x = rng.standard_normal(shape)
        return jnp.asarray(x + 1j * rng.standard_normal(shape), "complex64") if is_complex else jnp.asarray(x, dtype)

    shape = (D,) if "constant" in kind else (B, T, D)
    size = np.exp(-strength * rng.exponential(size=shape))
    turn = np.exp(1j * rng.uniform(0, 2 * np.pi, shape)) if is_complex else rng.choice([-1, 1], shape)
    arrays = {"a": jnp.asarray(size * turn, "complex64" if is_complex else dtype), "b": normal(B, T, D)}
    if state:
        arrays["state"] = normal(B, D).astype("complex64" if is_complex else "float32")
    return arrays


def forward_and_grads(implementation, arrays, **options):
    def loss(arrays):
        h, state = linear_recurrence(**arrays, **options, implementation=implementation)
        weights = (jnp.cos(jnp.arange(x.size) + 0.3).reshape(x.shape) for x in (h, state))
        total = sum((x * w).sum() for x, w in zip((h, state), weights))
        return jnp.real(total * (1 - 0.5j)).astype(jnp.float32), {"h": h, "state": state}

    (_, outputs), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return outputs | {"d" + name: value for name, value in grads.items()}


def as_real(x):
    x = np.asarray(x)
    return np.stack([x.real, x.imag]) if np.iscomplexobj(x) else x


def assert_near(got, want, tolerance):
    assert got.keys() == want.keys()
    for name in want:
        assert rel_rms(as_real(got[name]), as_real(want[name])) < tolerance, name


def by_loops(a, b, state=None, reset=None, reverse=False):
    """The definition in NumPy float64 or complex128."""
    dtype = np.complex128 if np.iscomplexobj(b) else np.float64
    b = np.asarray(b, dtype)
    a = np.broadcast_to(np.asarray(a, dtype), b.shape)
    s = np.zeros(b[:, 0].shape, dtype) if state is None else np.asarray(state, dtype)
    h = np.zeros_like(b)
    for t in reversed(range(b.shape[1])) if reverse else range(b.shape[1]):
        for i in range(b.shape[0]):
            kept = 0 if reset is not None and reset[i, t] else a[i, t] * s[i]
            s[i] = h[i, t] = kept + b[i, t]
    return h, s


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_equals_the_definition(implementation, kind, reverse):
    arrays = make_inputs(2, 67, 5, kind=kind)
    reset = np.random.default_rng(1).random((2, 67)) < 0.1
    h, state = linear_recurrence(**arrays, reset=jnp.asarray(reset), reverse=reverse, implementation=implementation)
    assert (h.dtype, state.dtype) == (arrays["b"].dtype, arrays["state"].dtype)
    want = dict(zip(("h", "state"), by_loops(**arrays, reset=reset, reverse=reverse)))
    assert_near({"h": h, "state": state}, want, 1e-5)


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("kind", FEWER)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 1, 3), {}),
        ((1, 63, 5), {"state": False, "reverse": True}),
        ((3, 64, 2), {"strength": 0.0}),  # |a| = 1: nothing is forgotten
        ((2, 101, 7), {"reset": True, "reverse": True}),
        ((2, 500, 3), {"strength": 30.0, "reset": True}),  # products underflow within a chunk
        ((2, 513, 3), {"strength": 0.01, "reverse": True}),
    ],
)
def test_matches_ref(implementation, kind, shape, options):
    options = dict(options)
    reset = jnp.asarray(np.random.default_rng(1).random(shape[:2]) < 0.1) if options.pop("reset", False) else None
    reverse = options.pop("reverse", False)
    arrays = make_inputs(*shape, kind=kind, **options)
    got, want = (forward_and_grads(name, arrays, reset=reset, reverse=reverse) for name in (implementation, "ref"))
    assert_near(got, want, 1e-5)


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("kind", ["real", "constant"])
def test_bfloat16(implementation, kind):
    arrays = make_inputs(2, 300, 7, kind=kind, strength=0.2, dtype="bfloat16")
    got = forward_and_grads(implementation, arrays)
    want = forward_and_grads("ref", {n: x.astype(jnp.float32) for n, x in arrays.items()})
    assert got["h"].dtype == got["da"].dtype == got["db"].dtype == jnp.bfloat16
    assert got["state"].dtype == jnp.float32
    assert_near({n: np.asarray(x, np.float32) for n, x in got.items()}, want, 1e-2)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("mixed", ["a", "b", "state"])
def test_one_complex_input_makes_all_complex(implementation, mixed):
    """The gradient of a real input among complex ones stays real."""
    arrays = make_inputs(2, 20, 3)
    arrays[mixed] = arrays[mixed] + 0.5j
    got = forward_and_grads(implementation, arrays)
    everything = forward_and_grads("ref", {name: x.astype(jnp.complex64) for name, x in arrays.items()})
    assert got["h"].dtype == got["state"].dtype == jnp.complex64
    for name, x in arrays.items():
        assert got["d" + name].dtype == x.dtype
        if name != mixed:
            everything["d" + name] = everything["d" + name].real
    assert_near(got, everything, 1e-5)


@pytest.mark.parametrize("implementation", FORMS)
def test_a_of_zero_forgets(implementation):
    """What follows is as exact as in a fresh sequence, and nothing flows back across."""
    arrays = make_inputs(1, 90, 4, strength=0.1)
    huge = arrays | {"a": arrays["a"].at[:, 37].set(0.0), "b": arrays["b"].at[:, :37].mul(1e30)}
    h, state = linear_recurrence(**huge, implementation=implementation)
    want_h, want_state = by_loops(arrays["a"][:, 37:], arrays["b"][:, 37:])
    assert rel_rms(h[:, 37:], want_h) < 1e-5
    assert rel_rms(state, want_state) < 1e-5

    def later(b):
        return linear_recurrence(huge["a"], b, implementation=implementation)[0][:, 37:].sum()

    assert not np.asarray(jax.grad(later)(arrays["b"])[:, :37]).any()


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("reverse", [False, True])
def test_two_halves_equal_the_whole(implementation, reverse):
    arrays = make_inputs(2, 100, 4, kind="complex")
    state, halves = arrays.pop("state"), []
    whole, last = linear_recurrence(**arrays, state=state, reverse=reverse, implementation=implementation)
    parts = [slice(0, 33), slice(33, 100)]
    for part in reversed(parts) if reverse else parts:
        half = {name: x[:, part] for name, x in arrays.items()}
        h, state = linear_recurrence(**half, state=state, reverse=reverse, implementation=implementation)
        halves.append(h)
    joined = jnp.concatenate(halves[::-1] if reverse else halves, 1)
    assert_near({"h": joined, "state": state}, {"h": whole, "state": last}, 1e-5)


@pytest.mark.parametrize("implementation", FORMS)
def test_padding_rows_stay_zero(implementation):
    arrays = make_inputs(2, 20, 3, state=False)
    arrays["b"] = arrays["b"].at[0].set(0.0)
    got = forward_and_grads(implementation, arrays)
    assert not np.asarray(got["h"][0]).any()
    assert all(np.isfinite(value).all() for value in got.values())


@pytest.mark.parametrize("implementation", FORMS)
def test_empty(implementation):
    arrays = make_inputs(2, 0, 3)
    h, state = linear_recurrence(**arrays, implementation=implementation)
    assert h.shape == (2, 0, 3)
    assert np.array_equal(state, arrays["state"])


@pytest.mark.parametrize("implementation", OTHERS)
def test_memory_is_linear(implementation):
    """What a gradient needs beside its inputs and results does not grow faster than T."""

    def temporary(length):
        x = jax.ShapeDtypeStruct((1, length, 8), jnp.float32)
        step = jax.jit(jax.grad(lambda a, b: linear_recurrence(a, b, implementation=implementation)[0].sum(), (0, 1)))
        return step.lower(x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 4.5 * temporary(1024)


def test_automatic_choice_is_known():
    assert {name for names in AUTO.values() for name in names} <= set(IMPLEMENTATIONS)


def test_shapes_that_do_not_fit():
    arrays = make_inputs(2, 8, 3)
    unchecked = inspect.unwrap(linear_recurrence)  # jaxtyping, in tests, would refuse them first
    with pytest.raises(ValueError, match=r"must be \[D\] or \[B T D\]"):
        unchecked(arrays["a"][:, :1], arrays["b"])
    with pytest.raises(ValueError, match="state"):
        unchecked(arrays["a"], arrays["b"], arrays["state"][:1])
