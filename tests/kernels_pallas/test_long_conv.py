import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.long_conv import IMPLEMENTATIONS, long_conv
from kernels_pallas.long_conv.direct import LONGEST
from kernels_pallas.long_conv.fft import fast_size
from tests.numerics import rel_rms

EVERYWHERE = sorted(set(IMPLEMENTATIONS) - {"pallas_tpu"})  # the TPU kernel has its own file
OTHERS = sorted(set(EVERYWHERE) - {"ref"})


def make_inputs(B, T, S, D, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((B, T, D)), dtype), jnp.asarray(rng.standard_normal((S, D)), dtype)


def forward_and_grads(implementation, x, filter):
    def loss(x, filter):
        y = long_conv(x, filter, implementation=implementation)
        return (y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)).sum(), y

    (_, y), (dx, dfilter) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, filter)
    return {"y": y, "dx": dx, "dfilter": dfilter}


def by_loops(x, filter):
    """The definition in NumPy float64."""
    x, filter = np.asarray(x, np.float64), np.asarray(filter, np.float64)
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        for s in range(min(t + 1, len(filter))):
            y[:, t] += filter[s] * x[:, t - s]
    return y


@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.parametrize(("T", "S"), [(1, 1), (37, 5), (40, 40)])
def test_equals_the_definition(implementation, T, S):
    if implementation == "direct" and S > LONGEST:
        pytest.skip("direct is for short filters")
    x, filter = make_inputs(2, T, S, 3)
    assert rel_rms(long_conv(x, filter, implementation=implementation), by_loops(x, filter)) < 1e-5


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("T", [1, 63, 64, 101, 500])
@pytest.mark.parametrize("taps", ["few", "all"])
def test_matches_ref(implementation, T, taps):
    S = min(T, 7) if taps == "few" else T
    if implementation == "direct" and S > LONGEST:
        pytest.skip("direct is for short filters")
    arrays = make_inputs(2, T, S, 3)
    got, want = (forward_and_grads(name, *arrays) for name in (implementation, "ref"))
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-5, name


@pytest.mark.parametrize("implementation", OTHERS)
def test_bfloat16(implementation):
    x, filter = make_inputs(2, 101, 6, 5, "bfloat16")
    got = forward_and_grads(implementation, x, filter)
    want = forward_and_grads("ref", x.astype(jnp.float32), filter.astype(jnp.float32))
    assert got["y"].dtype == got["dx"].dtype == got["dfilter"].dtype == jnp.bfloat16
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-2, name


@pytest.mark.parametrize("implementation", [None, *EVERYWHERE])
@pytest.mark.parametrize(("T", "S"), [(0, 0), (3, 0)])
def test_empty(implementation, T, S):
    x, filter = make_inputs(2, T, S, 3)
    assert not np.asarray(long_conv(x, filter, implementation=implementation)).any()


def test_automatic_choice_goes_by_the_number_of_taps():
    for S in (LONGEST, LONGEST + 1):
        x, filter = make_inputs(1, 64, S, 2)
        assert rel_rms(long_conv(x, filter), by_loops(x, filter)) < 1e-5
    with pytest.raises(NotImplementedError, match=f"{LONGEST + 1} taps"):
        long_conv(x, filter, implementation="direct")


def test_a_filter_longer_than_the_sequence_is_refused():
    x, filter = make_inputs(1, 4, 4, 2)
    with pytest.raises(ValueError, match="S <= T"):
        long_conv(x[:, :3], filter)


def test_fast_sizes():
    assert [fast_size(n) for n in (1, 2, 7, 8191, 3999, 17)] == [2, 2, 8, 8192, 4000, 18]


def test_bfloat16_long():
    x, filter = make_inputs(2, 101, 101, 5, "bfloat16")
    got = forward_and_grads("fft", x, filter)
    want = forward_and_grads("ref", x.astype(jnp.float32), filter.astype(jnp.float32))
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-2, name


@pytest.mark.parametrize("implementation", OTHERS)
def test_a_row_of_zeros(implementation):
    """Nothing leaks between rows of the batch."""
    x, filter = make_inputs(3, 50, 8, 2)
    x = x.at[1].set(0.0)
    got = forward_and_grads(implementation, x, filter)
    assert not np.asarray(got["y"][1]).any()
    assert all(np.isfinite(value).all() for value in got.values())


def test_no_leak_from_the_future():
    """The transform sees the whole sequence; what comes back from the future is rounding alone."""
    x, filter = make_inputs(1, 300, 300, 2)
    before, after = (long_conv(a, filter, implementation="fft") for a in (x, x.at[:, 150:].multiply(100.0)))
    assert rel_rms(after[:, :150], before[:, :150]) < 1e-4


def test_every_length_fits_its_transform():
    """Nothing wraps around into the outputs."""
    for T in (2, 5, 8, 14):
        for S in {1, (T + 1) // 2, T}:
            x, filter = make_inputs(1, T, S, 1, seed=T)
            assert rel_rms(long_conv(x, filter, implementation="fft"), by_loops(x, filter)) < 1e-5
