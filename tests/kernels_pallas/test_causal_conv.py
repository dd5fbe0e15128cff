import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.causal_conv import IMPLEMENTATIONS, causal_conv
from tests.numerics import rel_rms

OTHERS = sorted(set(IMPLEMENTATIONS) - {"ref", "pallas_tpu"})  # the TPU kernel has its own file


def make_inputs(B, T, D, W, dtype="float32", seed=0):
    """x, filter, bias and past."""
    rng = np.random.default_rng(seed)
    shapes = [(B, T, D), (W, D), (D,), (B, W - 1, D)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def forward_and_grads(implementation, arrays, **options):
    """y, the past that follows and the gradient of every array."""

    def loss(*arrays):
        y, past = causal_conv(*arrays, implementation=implementation, **options)
        weight = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        weight = weight.astype(jnp.bfloat16).astype(jnp.float32)  # a cotangent that loses nothing in bfloat16
        return (y * weight).sum() + (past * 0.3).sum(), (y, past)

    (_, (y, past)), grads = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(arrays))), has_aux=True))(*arrays)
    return {"y": y, "past": past} | dict(zip(("dx", "dfilter", "dbias", "dpast"), grads))


def hidden(B, T):
    """Padding at the front of the first row; three packed sequences, cut elsewhere in the last row."""
    keep = np.ones((B, T), bool)
    keep[0, : T // 3] = False
    segments = np.sort(np.random.default_rng(1).integers(0, 3, (B, T)), axis=1)
    return {"keep": jnp.asarray(keep), "segment_ids": jnp.asarray(segments, jnp.int32)}


def by_loops(x, filter, bias, past):
    """The definition in NumPy float64."""
    x, filter, bias, past = (np.asarray(a, np.float64) for a in (x, filter, bias, past))
    row = np.concatenate([past, x], axis=1)
    y = np.zeros_like(x) + bias
    for t in range(x.shape[1]):
        for i in range(len(filter)):
            y[:, t] += filter[i] * row[:, t + len(filter) - 1 - i]
    return y, row[:, row.shape[1] - past.shape[1] :]


@pytest.mark.parametrize("implementation", ["ref", *OTHERS])
@pytest.mark.parametrize(("T", "W"), [(1, 4), (2, 4), (9, 1), (23, 8)])
def test_equals_the_definition(implementation, T, W):
    arrays = make_inputs(2, T, 5, W)
    y, past = by_loops(*arrays)
    got = causal_conv(*arrays, implementation=implementation)
    assert rel_rms(got[0], y) < 1e-6
    np.testing.assert_array_equal(got[1], np.asarray(past, np.float32))
    silu = causal_conv(*arrays, activation="silu", implementation=implementation)[0]
    assert rel_rms(silu, y / (1 + np.exp(-y))) < 1e-6


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("case", ["plain", "hidden"])
@pytest.mark.parametrize(("dtype", "tol"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_matches_ref(implementation, case, dtype, tol):
    options = {"activation": "silu"} | (hidden(2, 64) if case == "hidden" else {})
    arrays = make_inputs(2, 64, 5, 4, dtype)
    got = forward_and_grads(implementation, arrays, **options)
    want = forward_and_grads("ref", [a.astype(jnp.float32) for a in arrays], **options)
    for name in want:
        assert rel_rms(got[name], want[name]) < tol, name


@pytest.mark.parametrize("implementation", ["ref", *OTHERS])
def test_packing_and_padding(implementation):
    """Packed sequences come out as alone; padding, NaN or not, reads as zeros; a row in two parts is the row."""
    x, filter, bias, past = make_inputs(3, 20, 5, 4)

    def run(*args, **options):
        return causal_conv(*args, implementation=implementation, **options)

    segments = jnp.broadcast_to(jnp.array([7] * 4 + [1] * 14 + [3] * 2), (3, 20))
    y, after = run(x, filter, bias, past, segment_ids=segments)
    alone = [run(x[:, :4], filter, bias, past), run(x[:, 4:18], filter, bias), run(x[:, 18:], filter, bias)]
    np.testing.assert_allclose(y, jnp.concatenate([part for part, _ in alone], 1), atol=1e-6)
    np.testing.assert_array_equal(after, alone[-1][1])
    keep = jnp.broadcast_to(jnp.arange(20) >= 3, (3, 20))
    y, after = run(x.at[:, :3].set(jnp.nan), filter, bias, keep=keep)
    np.testing.assert_allclose(y[:, 3:], run(x[:, 3:], filter, bias)[0], atol=1e-6)
    first, between = run(x[:, :9], filter, bias, past)
    second, _ = run(x[:, 9:], filter, bias, between)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), run(x, filter, bias, past)[0], atol=1e-6)


def test_empty_and_wrong():
    x, filter, bias, past = make_inputs(2, 5, 3, 4)
    y, after = causal_conv(x[:, :0], filter, bias, past)
    assert y.shape == (2, 0, 3)
    np.testing.assert_array_equal(after, past)
    with pytest.raises(ValueError, match="W-1"):
        causal_conv(x, filter, bias, past[:, 1:])
