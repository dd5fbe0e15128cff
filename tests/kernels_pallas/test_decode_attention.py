import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import mosaic_tpu
from kernels_pallas.decode_attention import IMPLEMENTATIONS, decode_attention, tiles
from kernels_pallas.decode_attention.chunked import decode_attention_chunked
from kernels_pallas.decode_attention.pallas_tpu import decode_attention_tpu
from tests.numerics import rel_rms

OTHERS = sorted(set(IMPLEMENTATIONS) - {"ref"})


def make_inputs(B, S, H, G, K, V, dtype="float32", seed=0):
    """q, k_cache, v_cache and lengths: the first row empty, the second full, the others between."""
    rng = np.random.default_rng(seed)
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((B, H, K), (B, S, G, K), (B, S, G, V))]
    lengths = rng.integers(1, S + 1, B)
    lengths[0] = 0 if B > 1 else lengths[0]
    lengths[1:2] = S
    return *arrays, jnp.asarray(lengths, jnp.int32)


def run(implementation, arrays, mode=True, **options):
    with mosaic_tpu.interpret(mode):
        return decode_attention(*arrays, implementation=implementation, **options)


def agree(implementation, dtype, *sizes, mode=True, **options):
    q, k, v, lengths = make_inputs(*sizes, dtype)
    want = run("ref", [a.astype(jnp.float32) for a in (q, k, v)] + [lengths], **options)
    got = run(implementation, (q, k, v, lengths), mode, **options)
    assert got.dtype == v.dtype
    assert rel_rms(got, want) < (1e-5 if dtype == "float32" else 1e-2)


def by_softmax(q, k, v, lengths, window=None, scale=None):
    """The definition in NumPy float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    each = q.shape[1] // k.shape[2]
    y = np.zeros((*q.shape[:2], v.shape[-1]))
    for b, length in enumerate(np.asarray(lengths)):
        first = 0 if window is None else max(0, length - window)
        for h in range(q.shape[1]) if length else ():
            scores = k[b, first:length, h // each] @ q[b, h] * (q.shape[-1] ** -0.5 if scale is None else scale)
            weights = np.exp(scores - scores.max())
            y[b, h] = weights @ v[b, first:length, h // each] / weights.sum()
    return y


@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
@pytest.mark.parametrize("options", [{}, {"window": 5, "scale": 0.7}])
def test_equals_the_definition(implementation, options):
    arrays = make_inputs(4, 24, 6, 2, 5, 7)
    assert rel_rms(run(implementation, arrays, **options), by_softmax(*arrays, **options)) < 1e-6


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("S", [1, 64, 101, 300])
def test_matches_ref(implementation, dtype, window, S, monkeypatch):
    monkeypatch.setattr(tiles, "MOST", 64)  # several tiles, the last hanging over the end
    monkeypatch.setattr(tiles, "TILE", 1)
    monkeypatch.setattr(tiles, "keys_per_step", lambda keys, size: min(keys, 64))
    agree(implementation, dtype, 3, S, 4, 2, 5, 7, window=window)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("S", [1, 64, 101, 512, 1000, 5000])
@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (16, 1)])
def test_every_length(implementation, dtype, S, heads):
    agree(implementation, dtype, 2, S, *heads, 16, 24)


def test_any_split_gives_the_same():
    q, k, v, lengths = make_inputs(3, 96, 4, 2, 5, 7)
    want = by_softmax(q, k, v, lengths, window=50)
    for splits in (1, 2, 3):
        options = {"window": 50, "scale": 5**-0.5, "splits": splits}
        assert rel_rms(decode_attention_chunked(q, k, v, lengths, **options)[0], want) < 1e-6
        got = decode_attention_tpu(q, k, v, lengths, **options, chunk=16, interpret=True)
        assert rel_rms(got[0], want) < 1e-6


def test_no_races(monkeypatch, capsys):
    """On two cores, and where memory not yet written is NaN. The detector itself only prints."""
    monkeypatch.setattr(tiles, "keys_per_step", lambda keys, size: min(keys, 16))
    monkeypatch.setattr(tiles, "splits", lambda *args: 2)
    mode = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    agree("pallas_tpu", "float32", 3, 40, 2, 1, 5, 7, mode=mode)
    assert "RACE" not in capsys.readouterr().out


@pytest.mark.parametrize("implementation", OTHERS)
def test_gradients(implementation):
    q, k, v, lengths = make_inputs(3, 24, 4, 2, 5, 7)

    def grads(name):
        def loss(q, k, v):
            return (run(name, (q, k, v, lengths)) ** 2).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    for got, want in zip(grads(implementation), grads("ref")):
        assert rel_rms(got, want) < 1e-5


def test_under_vmap():
    arrays = make_inputs(3, 24, 4, 2, 5, 7)
    stacked = [jnp.stack([a, a]) for a in arrays]
    got = jax.vmap(lambda *arrays: run("pallas_tpu", arrays))(*stacked)
    assert rel_rms(got[1], by_softmax(*arrays)) < 1e-6


def test_empty_and_wrong():
    q, k, v, lengths = make_inputs(2, 5, 4, 2, 3, 3)
    assert not np.asarray(decode_attention(q, k[:, :0], v[:, :0], 0 * lengths)).any()
    with pytest.raises(ValueError, match="divide"):
        decode_attention(q[:, :3], k, v, lengths)
    with pytest.raises(ValueError, match="window"):
        decode_attention(q, k, v, lengths, window=0)
    with pytest.raises(NotImplementedError, match="float16"):
        run("pallas_tpu", (q.astype(jnp.float16), k, v, lengths))
