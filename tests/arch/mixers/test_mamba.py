"""mamba and mamba2 against their equations in NumPy float64, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arch.errors import ConfigError
from kernels_pallas.dispatch import KERNELS
from kernels_pallas.linear_attention import IMPLEMENTATIONS as LINEAR_IMPLEMENTATIONS
from kernels_pallas.selective_scan import IMPLEMENTATIONS as SCAN_IMPLEMENTATIONS
from tests.arch.mixer_cases import B, D, T, build
from tests.numerics import rel_rms


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (B, T, D))


def f64(param):
    return np.asarray(param[...], np.float64)


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def convolved(conv, x):
    """silu of the causal convolution, a tap at a time."""
    kernel = f64(conv.kernel)
    y = np.zeros_like(x) + f64(conv.bias)
    for i in range(len(kernel)):
        y[:, i:] += x[:, : x.shape[1] - i] * kernel[i]
    return silu(y)


@pytest.mark.parametrize("implementation", sorted(set(SCAN_IMPLEMENTATIONS) - set(KERNELS)))
@pytest.mark.parametrize("case", ["mamba", "mamba/wide"])
def test_mamba_equation(case, implementation, x):
    mixer = build(case, "causal", implementation=implementation)
    N, R = mixer.state_size, mixer.rank
    u, z = np.split(np.asarray(x, np.float64) @ f64(mixer.inputs.kernel), 2, axis=-1)
    u = convolved(mixer.conv, u)
    r, b, c = np.split(u @ f64(mixer.select.kernel), [R, R + N], axis=-1)
    delta = softplus(r @ f64(mixer.steps) + f64(mixer.steps_bias))
    A, y, h = -np.exp(f64(mixer.A_log)), np.zeros_like(u), np.zeros((B, mixer.inner, N))
    for t in range(T):
        h = np.exp(delta[:, t, :, None] * A) * h + (delta * u)[:, t, :, None] * b[:, t, None]
        y[:, t] = (h * c[:, t, None]).sum(-1) + f64(mixer.D) * u[:, t]
    assert rel_rms(mixer(x), (y * silu(z)) @ f64(mixer.out.kernel)) < 1e-5


def mamba2_inside(mixer, x):
    """z, u [B T H V], B and C [B T H N], delta [B T H]."""
    z, mixed, r = np.split(np.asarray(x, np.float64) @ f64(mixer.inputs.kernel), mixer.sizes, axis=-1)
    H, V, N, G = mixer.heads, mixer.head_dim, mixer.state_size, mixer.groups
    u, b, c = np.split(convolved(mixer.conv, mixed), [H * V, H * V + G * N], axis=-1)
    b, c = (np.repeat(a.reshape(B, T, G, N), H // G, axis=2) for a in (b, c))
    return z, u.reshape(B, T, H, V), b, c, softplus(r + f64(mixer.steps_bias))


def mamba2_outside(mixer, y, z):
    """Gate, norm of each group, projection."""
    y = (y.reshape(z.shape) * silu(z)).reshape(B, T, mixer.groups, -1)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * f64(mixer.norm.scale)
    return y.reshape(z.shape) @ f64(mixer.out.kernel)


@pytest.mark.parametrize("implementation", sorted(set(LINEAR_IMPLEMENTATIONS) - set(KERNELS)))
@pytest.mark.parametrize("case", ["mamba2", "mamba2/groups"])
def test_mamba2_equation(case, implementation, x):
    mixer = build(case, "causal", implementation=implementation)
    z, u, b, c, delta = mamba2_inside(mixer, x)
    S, y = np.zeros((B, mixer.heads, mixer.state_size, mixer.head_dim)), np.zeros_like(u)
    decay = np.exp(-np.exp(f64(mixer.A_log)) * delta)
    for t in range(T):
        S = decay[:, t, :, None, None] * S + b[:, t, :, :, None] * (delta[:, t, :, None] * u[:, t])[:, :, None]
        y[:, t] = np.einsum("bhn,bhnv->bhv", c[:, t], S) + f64(mixer.D)[:, None] * u[:, t]
    assert rel_rms(mixer(x), mamba2_outside(mixer, y, z)) < 1e-5


@pytest.mark.parametrize("case", ["mamba2", "mamba2/groups"])
def test_mamba2_weights(case, x):
    """The dense quadratic form gives the same output."""
    mixer = build(case, "causal")
    z, u, *_ = mamba2_inside(mixer, x)
    y = np.einsum("bhts,bshv->bthv", np.asarray(mixer.weights(x), np.float64), u)
    assert rel_rms(mixer(x), mamba2_outside(mixer, y, z)) < 1e-5


def test_initial_dynamics():
    """The paper's: A = -(1 ... N) in every channel, steps log-uniform in [0.001, 0.1]; a decay in [-16, -1] a head."""
    mamba, mamba2 = build("mamba", "causal", expand=32), build("mamba2", "causal", expand=32, head_dim=1)
    A = -np.exp(f64(mamba.A_log))
    assert rel_rms(A, np.tile(-np.arange(1, 17), (32 * D, 1))) < 1e-6
    for mixer in (mamba, mamba2):
        steps = softplus(f64(mixer.steps_bias))
        assert 0.00099 < steps.min() < 0.0013
        assert 0.08 < steps.max() < 0.1001
        assert abs(np.median(np.log10(steps)) + 2) < 0.15
        assert not (f64(mixer.D) - 1).any()
    rates = np.exp(f64(mamba2.A_log))
    assert 1 <= rates.min() < 1.5 < 15.5 < rates.max() <= 16


def test_selects():
    """A mixer whose step is large where a channel says so keeps one token and forgets what came before."""
    mixer = build("mamba", "causal")
    steps = jnp.full(mixer.steps_bias.shape, 20.0)
    mixer.steps_bias[...] = steps
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    far = mixer(x.at[:, 0].add(1.0)) - mixer(x)
    assert float(jnp.abs(far[:, :4]).max()) > 1e-3
    np.testing.assert_allclose(far[:, 4:], 0, atol=1e-6)  # beyond the convolution nothing is left


@pytest.mark.parametrize(
    ("case", "options", "field"),
    [
        ("mamba", {"step_min": 0.2}, "step_min"),
        ("mamba2", {"head_dim": 7}, "head_dim"),
        ("mamba2", {"groups": 2, "head_dim": 32}, "groups"),
        ("mamba", {"implementation": "chunky"}, "implementation"),
    ],
)
def test_options_that_do_not_fit(case, options, field):
    with pytest.raises(ConfigError, match=field):
        build(case, "causal", **options)


@pytest.mark.parametrize("case", ["mamba", "mamba2"])
def test_causal_only(case):
    with pytest.raises(ConfigError, match="bidirectional"):
        build(case, "bidirectional")
