"""The mixer contract, held for every mixer and mode in the registry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import arch.mixers  # noqa: F401
from arch.positions import Rotary
from arch.registry import MIXERS
from arch.schema import names_of
from tests.numerics import rel_rms

B, T, D = 3, 13, 12  # sizes that all differ; T divides no tile
OPTIONS = {"softmax": {"num_heads": 4, "kv_heads": 2}, "linear": {"num_heads": 2, "head_dim": 5}}
CASES = [(name, mode) for name in MIXERS.names() for mode in MIXERS[name].modes]
CAUSAL = [name for name, mode in CASES if mode == "causal"]


def build(name, mode, **options):
    entry = {"kind": name, **OPTIONS.get(name, {}), **options}
    return MIXERS.build(entry, key="kind", width=D, causal=mode == "causal", max_length=T, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (B, T, D))


@pytest.fixture(scope="module")
def keep():
    """Padding in front (which a causal mixer would see), padding behind, a row of padding alone."""
    t = jnp.arange(T)
    return jnp.stack([t >= 5, t < 8, t < 0])


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_shape_and_dtype(name, mode, x):
    mixer = build(name, mode)
    for dtype in (jnp.float32, jnp.bfloat16):
        graph, state = nnx.split(mixer)
        cast = nnx.merge(graph, jax.tree.map(lambda p, dtype=dtype: p.astype(dtype), state))
        y = jax.eval_shape(cast, x.astype(dtype))
        assert (y.shape, y.dtype) == (x.shape, dtype)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_mixes_tokens(name, mode, x):
    """Token 3 reaches token 4: without this, every test of what must not reach would pass on the identity."""
    mixer = build(name, mode)
    moved = mixer(x.at[:, 3].add(1.0)) - mixer(x)
    assert float(jnp.abs(moved[:, 4]).max()) > 1e-4


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_sees_no_future(name, x):
    mixer = build(name, "causal")
    before, after = mixer(x), mixer(x.at[:, 6:].add(3.0))
    np.testing.assert_allclose(before[:, :6], after[:, :6], atol=1e-6)
    assert float(jnp.abs(before[:, 6:] - after[:, 6:]).max()) > 1e-3


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_padding_is_inert(name, mode, x, keep):
    """What stands on padding changes no other token, and a row of padding alone stays finite, gradient too."""
    mixer = build(name, mode)
    other = jnp.where(keep[..., None], x, 7.0)
    a, b = mixer(x, keep=keep), mixer(other, keep=keep)
    np.testing.assert_allclose(a[keep], b[keep], atol=1e-5)
    assert bool(jnp.isfinite(a).all())
    gradient = jax.grad(lambda x: jnp.sum(jnp.where(keep[..., None], mixer(x, keep=keep), 0) ** 2))(x)
    assert bool(jnp.isfinite(gradient).all())
    np.testing.assert_allclose(gradient[~keep], 0, atol=1e-6)


@pytest.mark.parametrize(("name", "mode"), [case for case in CASES if case[0] != "fourier"])
def test_padding_equals_a_shorter_row(name, mode, x, keep):
    """A padded row mixes as the row alone does. Fourier's transform runs over the padded length, as FNet's does."""
    mixer = build(name, mode)
    y = mixer(x, keep=keep)
    np.testing.assert_allclose(y[0, 5:], mixer(x[:1, 5:])[0], atol=1e-5)
    np.testing.assert_allclose(y[1, :8], mixer(x[1:2, :8])[0], atol=1e-5)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_batch_order_is_irrelevant(name, mode, x):
    mixer = build(name, mode)
    np.testing.assert_allclose(mixer(x)[::-1], mixer(x[::-1]), atol=1e-6)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("rotary", [False, True])
def test_stepwise_equals_parallel(name, rotary, x):
    if rotary and "rotary" not in names_of(MIXERS[name]):
        pytest.skip(f"{name} takes no rotary positions")
    given = {"rotary": Rotary(D)} if rotary else {}
    entry = {"kind": name, **OPTIONS.get(name, {})}
    mixer = MIXERS.build(entry, key="kind", width=D, causal=True, max_length=T, rngs=nnx.Rngs(0), **given)
    state, outputs = mixer.init_state(B, T), []
    sizes = jax.tree.map(jnp.shape, state)
    for t in range(T):
        y, state = mixer.step(x[:, t], state)
        outputs.append(y)
    assert jax.tree.map(jnp.shape, state) == sizes  # the state does not grow
    assert rel_rms(jnp.stack(outputs, 1), mixer(x)) < 1e-4


@pytest.mark.parametrize("name", CAUSAL)
def test_state_grows_only_where_the_class_says_so(name):
    mixer = build(name, "causal")
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(mixer.init_state(B, length))) for length in (T, 2 * T)]
    assert (sizes[0] == sizes[1]) or "grows" in type(mixer).__doc__


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_compiles_once_and_is_deterministic(name, mode, x):
    mixer = build(name, mode)
    traces = []

    @jax.jit
    def run(x):
        traces.append(1)
        return mixer(x)

    np.testing.assert_array_equal(run(x), run(x + 0.0))
    assert len(traces) == 1


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_bf16_gradients_are_finite_and_near(name, mode, x):
    graph, state = nnx.split(build(name, mode))

    def gradient(dtype):
        def loss(state, x):
            return jnp.sum(jnp.square(nnx.merge(graph, state)(x).astype(jnp.float32)))

        cast = jax.tree.map(lambda p: p.astype(dtype), state)
        return jax.grad(loss, argnums=(0, 1))(cast, x.astype(dtype))

    for low, high in zip(jax.tree.leaves(gradient(jnp.bfloat16)), jax.tree.leaves(gradient(jnp.float32))):
        assert low.dtype == jnp.bfloat16
        assert rel_rms(low.astype(jnp.float32), high) < 0.05  # bf16 has 8 bits; a few roundings in a row


@pytest.mark.parametrize(("name", "mode"), CASES)
@pytest.mark.parametrize("length", [0, 1])
def test_empty_and_single_token(name, mode, length, x):
    if name == "fourier" and length == 0:
        pytest.skip("a Fourier transform of no points does not exist")
    y = build(name, mode)(x[:, :length])
    assert y.shape == (B, length, D)
    assert bool(jnp.isfinite(y).all())


@pytest.mark.parametrize("name", [name for name in MIXERS.names() if MIXERS[name].axes is None])
def test_grids(name):
    """A grid of one row mixes as the sequence does; a real grid mixes along both axes and keeps padding inert."""
    mixer = build(name, "bidirectional")
    grid = jax.random.normal(jax.random.key(1), (2, 5, 7, D))
    np.testing.assert_allclose(mixer(grid[:, :1])[:, 0], mixer(grid[:, 0]), atol=1e-4)
    moved = mixer(grid.at[:, 2, 3].add(1.0)) - mixer(grid)
    assert float(jnp.abs(moved[:, 1, 3]).max()) > 1e-4
    assert float(jnp.abs(moved[:, 2, 2]).max()) > 1e-4
    keep = jnp.ones((2, 5, 7), bool).at[1, 3:].set(False)
    a = mixer(grid, keep=keep)
    b = mixer(jnp.where(keep[..., None], grid, 5.0), keep=keep)
    np.testing.assert_allclose(a[keep], b[keep], atol=1e-4)


def test_softmax_packing(x):
    """Two sequences in one row mix as two rows do."""
    mixer = build("softmax", "causal")
    segments = jnp.broadcast_to((jnp.arange(T) >= 6).astype(jnp.int32), (B, T))
    y = mixer(x, segment_ids=segments)
    np.testing.assert_allclose(y[:, 6:], mixer(x[:, 6:]), atol=1e-5)
    np.testing.assert_allclose(y[:, :6], mixer(x[:, :6]), atol=1e-5)


def test_softmax_equation(x):
    """Against the equation in NumPy float64, grouped heads included."""
    mixer = build("softmax", "bidirectional")
    qkv = np.asarray(x, np.float64) @ np.asarray(mixer.qkv.kernel[...], np.float64)
    q, k, v = np.split(qkv.reshape(B, T, 8, 3), [4, 6], axis=2)
    k, v = np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)
    scores = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(3)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("bhts,bshv->bthv", weights, v).reshape(B, T, D) @ np.asarray(mixer.out.kernel[...], np.float64)
    assert rel_rms(mixer(x), y) < 1e-5


@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
def test_linear_equation(mode, x):
    mixer = build("linear", mode)
    qkv = np.asarray(x, np.float64) @ np.asarray(mixer.qkv.kernel[...], np.float64)
    q, k, v = np.split(qkv.reshape(B, T, 6, 5), 3, axis=2)
    q, k = (np.where(a > 0, a + 1, np.exp(a)) for a in (q, k))
    weights = np.einsum("bthk,bshk->bhts", q, k)
    if mode == "causal":
        weights = weights * np.tri(T)
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("bhts,bshv->bthv", weights, v).reshape(B, T, 10) @ np.asarray(mixer.out.kernel[...], np.float64)
    assert rel_rms(mixer(x), y) < 1e-5


def test_pooling_equation():
    """PoolFormer's 3x3 mean without counting the border, less the input, by loops."""
    x = np.asarray(jax.random.normal(jax.random.key(2), (2, 4, 5, D)), np.float64)
    want = np.zeros_like(x)
    for i in range(4):
        for j in range(5):
            want[:, i, j] = x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean(axis=(1, 2)) - x[:, i, j]
    assert rel_rms(build("pooling", "bidirectional")(jnp.asarray(x, jnp.float32)), want) < 1e-5


@pytest.mark.parametrize("orthonormal", [False, True])
def test_fourier_equation(orthonormal, x):
    want = np.fft.fft(np.fft.fft(np.asarray(x, np.float64), axis=2), axis=1).real
    scale = np.sqrt(T * D) if orthonormal else 1.0
    assert rel_rms(build("fourier", "bidirectional", orthonormal=orthonormal)(x), want / scale) < 1e-5


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_bf16_training_step_compiles_and_runs(name, mode):
    """Whole programs in bf16: XLA's CPU once refused a product that the mixer alone could run."""
    x = jnp.ones((4, 33, D), jnp.bfloat16)
    graph, state = nnx.split(build(name, mode))
    cast = jax.tree.map(lambda p: p.astype(jnp.bfloat16), state)
    loss = jax.jit(jax.grad(lambda s, x: jnp.sum(nnx.merge(graph, s)(x).astype(jnp.float32) ** 2), argnums=1))
    assert bool(jnp.isfinite(loss(cast, x)).all())
