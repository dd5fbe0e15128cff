import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import IMPLEMENTATIONS, attention, tiles
from kernels_pallas.attention.gathered import split_rows
from kernels_pallas.dispatch import KERNELS
from tests.numerics import rel_rms

EVERYWHERE = sorted(set(IMPLEMENTATIONS) - set(KERNELS))  # kernels have their own tests
OTHERS = sorted(set(EVERYWHERE) - {"ref"})


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that neither divide the lengths nor have one shape, and a loop over batch and heads."""
    monkeypatch.setattr(tiles, "ROWS", 128)
    monkeypatch.setattr(tiles, "COLUMNS", 96)
    monkeypatch.setattr(tiles, "SKIPPED", 64)
    monkeypatch.setattr(tiles, "STRIP", 16)
    monkeypatch.setattr(tiles, "LINE", 16)
    monkeypatch.setattr(tiles, "ELEMENTS", 128 * 96)
    monkeypatch.setattr(tiles, "BAND", (16, 48))
    monkeypatch.setattr(tiles, "GATHERED", (4, 1024))


def make_inputs(B, T, S, H, G, K, V, *, bias=None, keep=False, segments=False, dtype="float32", seed=0):
    """Random arguments; with keep, batch row 0 is nothing but padding."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    arrays = {"q": normal(B, T, H, K), "k": normal(B, S, G, K), "v": normal(B, S, G, V)}
    options = {}
    if bias is not None:
        arrays["bias"] = normal(*bias)
    if keep:
        options["keep"] = jnp.asarray((rng.random((B, S)) < 0.7) & (np.arange(B) > 0)[:, None])
    if segments:
        ids = np.sort(rng.integers(0, 3, (B, max(T, S))), 1).astype(np.int32)
        options["segment_ids"] = (jnp.asarray(ids[:, -T:]), jnp.asarray(ids[:, -S:]))
    return arrays, options


def forward_and_grads(implementation, arrays, **options):
    """Outputs and the gradient of a weighted sum of both outputs for every array."""
    has_lse = options.get("activation", "softmax") == "softmax"

    def loss(arrays):
        y = attention(**arrays, **options, return_lse=has_lse, implementation=implementation)
        y, lse = y if has_lse else (y, jnp.zeros((1, 1, 1)))
        weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        lse_weights = jnp.sin(jnp.arange(lse.size, dtype=jnp.float32)).reshape(lse.shape)
        total = (y * weights).sum() + jnp.where(jnp.isfinite(lse), lse * lse_weights, 0.0).sum()
        return total, {"y": y, "lse": lse}

    (_, outputs), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return outputs | {"d" + name: value for name, value in grads.items()}


def by_loops(q, k, v, *, causal, window=None, keep=None, segment_ids=None, bias=None, sigmoid=False):
    """The definition in NumPy float64, one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    y = np.zeros((B, T, H, v.shape[-1]))
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        position, group = t + S - T, h // (H // G)
        weights = np.zeros(S)
        for s in range(S):
            if causal and s > position:
                continue
            if window is not None and not -window[0] <= s - position <= window[1]:
                continue
            if keep is not None and not keep[b, s]:
                continue
            if segment_ids is not None and segment_ids[0][b, t] != segment_ids[1][b, s]:
                continue
            score = q[b, t, h] @ k[b, s, group] / np.sqrt(K) + (0 if bias is None else float(bias[b, h, t, s]))
            weights[s] = 1 / (1 + np.exp(-score)) if sigmoid else np.exp(score)
        total = 1.0 if sigmoid else weights.sum()
        if total > 0:
            y[b, t, h] = weights / total @ v[b, :, group]
    return y


@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_equals_the_definition(implementation, activation):
    arrays, options = make_inputs(2, 7, 9, 6, 2, 5, 3, bias=(2, 6, 7, 9), keep=True, segments=True)
    options |= {"causal": True, "window": (4, 0)}
    want = by_loops(**arrays, **options, sigmoid=activation == "sigmoid")
    got = attention(**arrays, **options, activation=activation, implementation=implementation)
    assert rel_rms(got, want) < 1e-5
    assert not np.asarray(got[0]).any()  # nothing but padding


CASES = {  # name: (B, T, S, H, G, K, V), options of make_inputs, options of attention
    "one": ((2, 1, 1, 3, 1, 4, 5), {}, {"causal": True}),
    "last of many": ((2, 1, 70, 3, 3, 4, 5), {"keep": True}, {"causal": True}),
    "causal": ((1, 513, 513, 2, 1, 8, 5), {}, {"causal": True}),
    "causal, more keys": ((2, 63, 301, 4, 2, 8, 7), {"keep": True}, {"causal": True}),
    "full": ((2, 301, 129, 2, 2, 8, 5), {"keep": True}, {"causal": False}),
    "window": ((1, 301, 301, 2, 1, 8, 5), {"segments": True}, {"causal": False, "window": (37, 5)}),
    "causal window": ((1, 520, 520, 2, 1, 8, 5), {}, {"causal": True, "window": (40, 9)}),
    "wide window": ((1, 301, 301, 2, 1, 8, 5), {"keep": True}, {"causal": False, "window": (190, 50)}),
    "narrow window": (
        (2, 303, 303, 4, 2, 8, 5),
        {"keep": True, "segments": True},
        {"causal": False, "window": (13, 20)},
    ),
    "far keys": ((2, 67, 303, 4, 2, 8, 5), {"keep": True}, {"causal": True, "window": (35, 0)}),
    "keys behind": ((2, 303, 67, 2, 2, 8, 5), {}, {"causal": False, "window": (8, 7)}),
    "only itself": ((2, 129, 129, 2, 1, 8, 5), {}, {"causal": False, "window": (0, 0)}),
    "sigmoid window": (
        (2, 140, 140, 2, 1, 8, 5),
        {"keep": True},
        {"causal": True, "window": (9, 0), "activation": "sigmoid"},
    ),
    "bias and window": ((1, 140, 140, 2, 1, 8, 5), {"bias": (1, 2, 140, 140)}, {"causal": True, "window": (9, 0)}),
    "bias of all": ((2, 150, 137, 2, 2, 8, 5), {"bias": (2, 2, 150, 137)}, {"causal": False}),
    "bias shared": ((2, 140, 140, 2, 1, 8, 5), {"bias": (1, 2, 140, 140), "keep": True}, {"causal": True}),
    "bias of keys": ((2, 20, 140, 2, 1, 8, 5), {"bias": (2, 1, 1, 140)}, {"causal": False, "scale": 0.7}),
    "sigmoid": ((2, 140, 140, 2, 1, 8, 5), {"keep": True}, {"causal": True, "activation": "sigmoid"}),
    **{f"causal {n}": ((2, n, n, 3, 1, 8, 5), {"keep": True}, {"causal": True}) for n in (63, 64, 101, 500)},
}


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("case", CASES)
def test_matches_ref(implementation, case, small_tiles):
    shape, given, options = CASES[case]
    arrays, extra = make_inputs(*shape, **given)
    options = options | extra
    got, want = forward_and_grads(implementation, arrays, **options), forward_and_grads("ref", arrays, **options)
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-5, name


@pytest.mark.parametrize("implementation", OTHERS)
def test_lone_tile_matches_ref(implementation):
    """Short sequences: batch and heads in one step, with no loop at all."""
    arrays, options = make_inputs(2, 63, 63, 6, 3, 4, 5, bias=(1, 6, 63, 63), keep=True, segments=True)
    got, want = (forward_and_grads(name, arrays, causal=True, **options) for name in (implementation, "ref"))
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-5, name


@pytest.mark.parametrize("implementation", OTHERS)
def test_bfloat16(implementation):
    arrays, options = make_inputs(2, 101, 101, 3, 1, 16, 7, keep=True, dtype="bfloat16")
    got = forward_and_grads(implementation, arrays, causal=True, **options)
    want = forward_and_grads("ref", {name: x.astype(jnp.float32) for name, x in arrays.items()}, causal=True, **options)
    assert got["y"].dtype == jnp.bfloat16
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-2, name


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("window", [None, (50, 10)])
def test_bfloat16_window(implementation, window, small_tiles):
    """bf16 through the forms that skip: a band, and a block mask with a few long rows."""
    arrays, options = make_inputs(2, 144, 144, 4, 2, 16, 7, keep=True, dtype="bfloat16")
    options |= {"window": (20, 10)} if window else {"block_mask": banded_mask(1, 18)[0]}
    got = forward_and_grads(implementation, arrays, causal=False, **options)
    want = forward_and_grads(
        "ref", {name: x.astype(jnp.float32) for name, x in arrays.items()}, causal=False, **options
    )
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-2, name


def banded_mask(heads, blocks):
    """Block n sees its neighbours and a few others, which differ by head; the first row and column are full."""
    near = np.abs(np.arange(blocks)[:, None] - np.arange(blocks)) < 2
    mask = near | (np.random.default_rng(4).random((heads, blocks, blocks)) < 0.1)
    mask[:, 0] = mask[:, :, 0] = True
    return mask


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("heads", "kv_heads", "masks"), [(4, 2, 1), (4, 2, 4), (2, 2, 2)])
def test_few_blocks_a_row(implementation, activation, heads, kv_heads, masks, small_tiles):
    """Block masks whose rows are short but for a few: those are gathered."""
    T, S, blocks = 24 * 6, 24 * 5, 24
    arrays, options = make_inputs(2, T, S, heads, kv_heads, 8, 5, keep=True, segments=True)
    mask = banded_mask(masks, blocks)
    mask[:, 7] = False  # these queries see nothing
    options |= {"block_mask": mask[0] if masks == 1 else mask, "causal": False, "activation": activation}
    got, want = (forward_and_grads(name, arrays, **options) for name in (implementation, "ref"))
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-5, name


def test_rows_of_a_mask_are_split_where_it_saves():
    mask = banded_mask(1, 64)
    near = split_rows(mask, 4096, 4096)
    assert not near[0]
    assert near[1:].mean() > 0.8
    assert split_rows(np.ones((1, 8, 8), bool), 512, 512) is None
    assert split_rows(mask, 128, 128) is None  # blocks of two tokens: products too small


@pytest.mark.parametrize("options", [{"window": (63, 0)}, {"block_mask": True}])
def test_memory_is_linear_where_keys_are_skipped(options):
    """Temporary memory of forward and backward for twice the length: about twice, not four times."""

    def temporary(T):
        given = dict(options)
        if "block_mask" in given:
            blocks = np.arange(T // 64)
            given["block_mask"] = np.abs(blocks[:, None] - blocks) < 2
        x = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)
        step = jax.grad(lambda q, k, v: attention(q, k, v, causal="window" in given, **given).sum(), (0, 1, 2))
        return jax.jit(step).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(32768) < 2.5 * temporary(16384)


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("per_head", [False, True])
def test_block_mask(implementation, per_head, small_tiles):
    T, M, N = 288, 9, 6
    arrays, _ = make_inputs(1, T, T, 2, 1, 8, 5)
    mask = np.random.default_rng(3).random((2, M, N) if per_head else (M, N)) < 0.4
    mask[..., 2, :] = False  # these queries see nothing
    got, want = (forward_and_grads(name, arrays, causal=False, block_mask=mask) for name in (implementation, "ref"))
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-5, name
    # The mask itself, against a bias that closes the same pairs.
    full = np.where(np.kron(mask, np.ones((T // M, T // N))), 0.0, -np.inf).reshape(1, -1, T, T)
    closed = attention(**arrays, causal=False, bias=jnp.asarray(full, jnp.float32), implementation="ref")
    assert rel_rms(got["y"], closed) < 1e-5


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_large_scores_do_not_overflow(implementation):
    arrays, _ = make_inputs(1, 140, 140, 1, 1, 8, 5)
    got = forward_and_grads(implementation, {**arrays, "q": arrays["q"] * 1e4}, causal=True)
    assert all(np.isfinite(value).all() for value in got.values())


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_empty(implementation):
    q, k = jnp.zeros((2, 0, 3, 4)), jnp.zeros((2, 5, 3, 4))
    assert attention(q, k, k, causal=True, implementation=implementation).shape == (2, 0, 3, 4)
    y, lse = attention(k, q, q, causal=False, return_lse=True, implementation=implementation)
    assert not np.asarray(y).any()
    assert (np.asarray(lse) == -np.inf).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": True, "window": (-1, 0)}, "window left"),
        ({"causal": False, "return_lse": True, "activation": "sigmoid"}, "return_lse"),
        ({"causal": False, "block_mask": np.ones((3, 2), bool)}, "block_mask"),
        ({"causal": False, "bias": jnp.zeros((1, 1, 8, 7))}, "bias"),
    ],
)
def test_contradictions_are_refused(options, message):
    arrays, _ = make_inputs(1, 8, 8, 2, 1, 4, 4)
    with pytest.raises((ValueError, TypeError), match=message):  # TypeError: jaxtyping saw it first
        attention(**arrays, **options)


def test_heads_must_divide_and_causal_needs_keys():
    q, k = jnp.zeros((1, 8, 3, 4)), jnp.zeros((1, 5, 2, 4))
    with pytest.raises(ValueError, match="do not divide"):
        attention(q, k, k, causal=False)
    with pytest.raises(ValueError, match="as many keys"):
        attention(q, k[:, :, :1], k[:, :, :1], causal=True)
