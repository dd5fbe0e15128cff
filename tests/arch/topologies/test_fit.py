"""FIT: its equations against a loop over groups, no leak from later tokens, padding, grids, decoding, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import arch.model
from arch.errors import ConfigError
from arch.model import functional, to_nested
from arch.registry import TOPOLOGIES
from arch.spec import InputSpec
from tests.numerics import rel_rms

D, E, M, T = 8, 12, 2, 14
BASE = {
    "topology": "fit",
    "width": D,
    "latent_width": E,
    "pattern": "(1)2(1)",
    "group_size": 4,
    "latents": M,
    "cross_heads": 2,
    "parts": {
        "local": {"kind": "softmax", "num_heads": 2},
        "global": {"kind": "softmax", "num_heads": 3},
        "mlp": {"kind": "mlp", "ratio": 2.0},
    },
    "norm": {"name": "layer"},
}


def build(*, length=T, grid=None, causal=False, remat="none", seed=0, **changes):
    """The topology of BASE with changes; `local` and `globe` replace the mixers."""
    parts = {**BASE["parts"], **{name: changes.pop(key) for key, name in MIXERS.items() if key in changes}}
    given = {"causal": causal, "remat": remat, "rngs": nnx.Rngs(seed), "max_length": length, "grid": grid}
    return TOPOLOGIES.build({**BASE, "parts": parts, **changes}, key="topology", **given)


MIXERS = {"local": "local", "globe": "global"}


def moved(fit, seed=9):
    """The same with every parameter a little elsewhere: biases and scales of norms do not stay 0 and 1 in training."""
    graph, state = nnx.split(fit)
    leaves, tree = jax.tree.flatten(state)
    leaves = [leaf + 0.2 * tokens(*leaf.shape, seed=seed + i) for i, leaf in enumerate(leaves)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def run(fit, x, keep=None):
    """One compiled call."""
    graph, state = nnx.split(fit)
    return jax.jit(lambda state, x, keep: nnx.merge(graph, state)(x, keep=keep))(state, x, keep)


def tokens(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape)


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


class Oracle:
    """FIT in float64, a group at a time and a token at a time: nothing of the library but the parameters."""

    def __init__(self, params, latents, size, causal):
        self.params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
        self.m, self.n, self.causal = latents, size, causal

    def norm(self, p, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * p["scale"] + p["bias"]

    def attend(self, q, k, v, heads, visible):
        out = []
        for head in np.split(np.arange(q.shape[-1]), heads):
            scores = q[:, head] @ k[:, head].T / np.sqrt(len(head))
            out.append(softmax(np.where(visible, scores, -np.inf)) @ v[:, head])
        return np.concatenate(out, -1)

    def block(self, p, x, heads, visible):
        q, k, v = np.split(self.norm(p["mix"]["norm"], x) @ p["mixer"]["qkv"]["kernel"], 3, -1)
        x = x + self.attend(q, k, v, heads, visible) @ p["mixer"]["out"]["kernel"]
        up, down = p["channel"]["up"], p["channel"]["down"]
        y = self.norm(p["transform"]["norm"], x) @ up["kernel"] + up["bias"]
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        return x + y @ down["kernel"] + down["bias"]

    def cross(self, p, x, source):
        if source is None:
            return x
        k, v = np.split(self.norm(p["norm_source"], source) @ p["kv"]["kernel"], 2, -1)
        q = self.norm(p["residual"]["norm"], x) @ p["q"]["kernel"]
        return x + self.attend(q, k, v, 2, np.ones((len(x), len(source)), bool)) @ p["out"]["kernel"]

    def __call__(self, x):
        """x[T D] of one row."""
        groups = [x[i : i + self.n] for i in range(0, len(x), self.n)]
        latents = [self.params["start"][g] for g in range(len(groups))]
        for _, p in sorted(self.params["levels"].items()):
            for _, block in sorted(p["local"]["blocks"].items()):
                see = [np.tri(len(g), dtype=bool) if self.causal else np.ones((len(g),) * 2, bool) for g in groups]
                groups = [self.block(block, g, 2, s) for g, s in zip(groups, see)]
            if "latent" not in p:
                continue
            latents = [self.cross(p["read"], z, g) for z, g in zip(latents, groups)]
            z, place = np.concatenate(latents), np.arange(len(latents) * self.m) // self.m
            see = place[:, None] >= place[None] if self.causal else np.ones((len(z),) * 2, bool)
            for _, block in sorted(p["latent"]["blocks"].items()):
                z = self.block(block, z, 3, see)
            latents = np.split(z, len(groups))
            if "write" in p:
                sources = [None, *latents[:-1]] if self.causal else latents
                groups = [self.cross(p["write"], g, s) for g, s in zip(groups, sources)]
        return self.norm(self.params["norm"], np.concatenate(groups)), np.concatenate(latents)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern", ["(1)2(1)", "(2)1(1)2(1)"])
def test_equations(pattern, causal):
    """T = 14 in groups of 4: the last has two tokens. Causal latents see their group's and former groups' latents."""
    fit = moved(build(pattern=pattern, causal=causal))
    x = tokens(2, T, D)
    oracle = Oracle(to_nested(nnx.state(fit, nnx.Param)), M, 4, causal)
    want = np.stack([oracle(np.asarray(row, np.float64))[0] for row in x])
    assert rel_rms(run(fit, x), want) < 1e-5


def test_latents_leave():
    """output="latents": the last norm of all latents, group after group."""
    fit = build(pattern="(1)2(1)1", output="latents")
    x = tokens(1, T, D)
    params = {**to_nested(nnx.state(fit, nnx.Param)), "norm": {"scale": np.ones(D), "bias": np.zeros(D)}}
    oracle = Oracle(params, M, 4, causal=False)
    latents = oracle(np.asarray(x[0], np.float64))[1]
    want = oracle.norm({"scale": np.ones(E), "bias": np.zeros(E)}, latents)
    assert fit.widths({**BASE, "output": "latents"}) == (D, E)
    assert rel_rms(run(fit, x)[0], want) < 1e-5


PAIRS = [
    ({"kind": "softmax", "num_heads": 2}, {"kind": "softmax", "num_heads": 2}),
    ({"kind": "softmax", "num_heads": 2}, {"kind": "linear", "num_heads": 2}),
    ({"kind": "mamba"}, {"kind": "softmax", "num_heads": 3, "kv_heads": 1}),
    ({"kind": "delta_net", "num_heads": 2}, {"kind": "gla", "num_heads": 2}),
    ({"kind": "local", "num_heads": 2, "window": 2}, {"kind": "hyena"}),
    ({"kind": "pooling"}, {"kind": "gated", "mixer": {"kind": "softmax", "num_heads": 2}}),
]
NAMES = ["-".join(part["kind"] for part in pair) for pair in PAIRS]


@pytest.mark.parametrize("pair", PAIRS, ids=NAMES)
def test_no_token_sees_a_later_one(pair):
    """Every token is changed in turn: no output before it moves, for any mixers; and what lies behind does."""
    fit = build(pattern="(1)1(1)1(1)", causal=True, local=pair[0], globe=pair[1])
    x = tokens(1, T, D)
    changed = x + 3 * jnp.eye(T)[:, :, None] * tokens(T, 1, D, seed=2)  # row t: token t is another
    y = run(fit, jnp.concatenate([x, changed]))
    effect = np.abs(y[1:] - y[:1]).max(-1)  # [changed token, output]
    seen = np.tri(T, dtype=bool).T
    assert effect[~seen].max() < 1e-5
    assert np.diag(effect).min() > 1e-3
    group = np.arange(T) // 4
    far = group[:, None] < group[None]
    assert effect[far].min() > 1e-6  # through the latents every former group is seen
    if pair[0]["kind"] in ("softmax", "mamba", "delta_net"):
        assert effect[seen].min() > 1e-6


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[3]], ids=[NAMES[0], NAMES[3]])
def test_decodes_as_it_trains(pair):
    """Token by token gives what the whole row gives, across the borders of groups."""
    fit = moved(build(pattern="(1)1(2)1(1)", causal=True, local=pair[0], globe=pair[1], token_positions="learned"))
    x = tokens(2, T, D)
    graph, params = nnx.split(fit)
    step = jax.jit(lambda params, x, state: nnx.merge(graph, params).step(x, state))
    state, got = fit.init_state(2, T), []
    for t in range(T):
        y, state = step(params, x[:, t], state)
        got.append(y)
    assert rel_rms(jnp.stack(got, 1), run(fit, x)) < 1e-5


def test_decodes_scanned_and_with_rotary():
    spec = InputSpec(11, 11, T)
    model = {**BASE, "pattern": "(2)2(1)", "scan": True, "causal": True, "positions": {"name": "rotary"}}
    net = functional({**model, "width": 12, "head": {"name": "language_model"}}, spec)
    params = net.init(jax.random.key(0))
    inputs = jax.random.randint(jax.random.key(1), (2, T), 1, 11)
    step = jax.jit(lambda p, x, state: net.module(p).step(x, state))
    state, got = net.module(params).init_state(2, T), []
    for t in range(T):
        y, state = step(params, inputs[:, t], state)
        got.append(y)
    assert rel_rms(jnp.stack(got, 1), net.apply(params, inputs)) < 1e-4


def test_padding_leaves_no_trace():
    """A padded row gives its tokens what the row alone gives them, whatever stands on the padding."""
    fit = build()
    x = tokens(1, T, D)
    for real in (4, 9):  # groups of padding alone, and one that is cut short
        keep = jnp.arange(T)[None] < real
        other = jnp.where(keep[..., None], x, 7.0)
        both = run(fit, jnp.concatenate([x, other]), jnp.concatenate([keep, keep]))[:, :real]
        np.testing.assert_allclose(both[0], both[1], atol=1e-5)
        assert rel_rms(both[:1], run(fit, x[:, :real])) < 1e-5
    latents = build(pattern="(1)2", output="latents")
    keep = jnp.arange(T)[None] < 5
    np.testing.assert_array_equal(latents.kept(keep), jnp.arange(8)[None] < 2 * M)
    assert rel_rms(run(latents, x, keep)[:, : 2 * M], run(latents, x[:, :5])) < 1e-5


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradients_are_finite_and_remat_changes_none(causal):
    x = tokens(3, T, D)
    keep = jnp.arange(T) < jnp.array([[T], [5], [0]])  # the last row is padding alone

    def gradient(remat):
        graph, params, rest = nnx.split(build(causal=causal, remat=remat, dropout=0.0), nnx.Param, ...)
        loss = lambda p: jnp.sum(jnp.where(keep[..., None], nnx.merge(graph, p, rest)(x, keep=keep), 0) ** 2)  # noqa: E731
        return to_nested(jax.jit(jax.grad(loss))(params))

    plain = gradient("none")
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(plain))
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(plain["levels"]["0"]["read"]))
    for remat in ("full", "dots"):
        assert jax.tree.all(jax.tree.map(lambda a, b: rel_rms(a, b) < 1e-5, gradient(remat), plain))


def test_scan_is_the_loop():
    """The layers of a run stacked on a leading axis and looped over give what they give one after the other."""
    plain, scanned = build(pattern="(2)3(1)"), build(pattern="(2)3(1)", scan=True)
    params, stacked = (to_nested(nnx.state(fit, nnx.Param)) for fit in (plain, scanned))
    for part in ("local", "latent"):
        level = params["levels"]["0"]
        blocks = level[part]["blocks"]
        one = jax.tree.map(lambda *a: jnp.stack(a), *(blocks[str(i)] for i in range(len(blocks))))
        level[part]["blocks"] = {"0": {"blocks": {"0": one}}}
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, stacked)
    graph, template = nnx.split(scanned)
    again = nnx.merge(graph, arch.model.from_nested(params, template))
    x = tokens(2, T, D)
    assert rel_rms(run(again, x), run(plain, x)) < 1e-5


def test_a_grid_is_cut_into_boxes():
    """A grid gives what the sequence of its boxes gives, one behind the other; boxes at the border are filled up."""
    axes, size = (6, 4), (3, 2)
    grid, row = build(grid=axes, group_size=size), build(length=24, group_size=6)
    x = tokens(2, *axes, D)
    boxes = x.reshape(2, 2, 3, 2, 2, D).swapaxes(2, 3)
    want = run(row, boxes.reshape(2, 24, D)).reshape(boxes.shape).swapaxes(2, 3).reshape(x.shape)
    assert rel_rms(run(grid, x), want) < 1e-5
    uneven = build(grid=(5, 7), group_size=size)
    assert jax.eval_shape(uneven, tokens(1, 5, 7, D)).shape == (1, 5, 7, D)
    assert uneven.number == 8


def test_local_mixers_see_the_box_as_a_grid():
    """A grid mixer as the local one pools over two axes, within the box alone."""
    fit = build(grid=(4, 6), group_size=(4, 3), pattern="(1)1(1)", local={"kind": "pooling"}, latents=1)
    x = tokens(1, 4, 6, D)
    only = functools.partial(fit.levels[0].local, keep=None)
    box = only(x[:, :, :3])
    assert box.shape == (1, 4, 3, D)
    moved = jnp.abs(only(x[:, :, :3].at[0, 0, 0].set(tokens(D, seed=5))) - box).max(-1)[0] > 1e-6
    assert moved[1, 1]  # a neighbour along both axes
    assert not moved[2, 0]


def test_sizes_follow_from_what_is_given():
    assert build(length=100, group_size=None, groups=7).size == (15,)
    assert build(grid=(6, 8), group_size=None, groups=(2, 4)).size == (3, 2)
    assert build(length=100, group_size=None, latents=2).size[0] % 8 == 0
    assert build(length=100, latents=1).number == 25


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"pattern": "(1)2"}, "pattern"),
        ({"output": "latents"}, "pattern"),
        ({"pattern": "(1)2", "output": "latents", "causal": True}, "output"),
        ({"groups": 3}, "groups"),
        ({"group_size": 15}, "group_size"),
        ({"group_size": (2, 2)}, "group_size"),
        ({"grid": (4, 4), "group_size": 4}, "group_size"),
        ({"grid": (4, 4), "group_size": None, "groups": 4}, "groups"),
        ({"cross_heads": 3}, "cross_heads"),
        ({"local_parts": ("near",)}, "local_parts"),
        ({"global_parts": ("mlp",)}, "global_parts"),
        ({"global_parts": ()}, "global_parts"),
        ({"local_channel": "local"}, "local_channel"),
        ({"causal": True, "globe": {"kind": "fourier"}}, "parts.global.kind"),
        ({"globe": {"kind": "mamba"}}, "parts.global.kind"),
        ({"scan": True, "pattern": "(1)1(1)"}, "scan"),
    ],
)
def test_refusals_name_the_field(changes, path):
    with pytest.raises(ConfigError) as caught:
        build(**changes)
    assert caught.value.path == path


def test_what_it_cannot_do():
    fit = build()
    with pytest.raises(ConfigError) as caught:
        fit(tokens(1, T, D), segment_ids=jnp.zeros((1, T), jnp.int32))
    assert caught.value.path == "segment_ids"
    with pytest.raises(ConfigError) as caught:
        fit.init_state(1, T)
    assert caught.value.path == "causal"
    with pytest.raises(ConfigError) as caught:
        fit(tokens(1, T + 4, D))
    assert caught.value.path == "max_length"
    model = {**BASE, "pattern": "(1)2", "output": "latents", "positions": {"name": "none"}}
    with pytest.raises(ConfigError) as caught:
        functional({**model, "head": {"name": "classifier", "pooling": "cls"}}, InputSpec(11, 5, T))
    assert caught.value.path == "head.pooling"
    net = functional({**model, "head": {"name": "classifier", "pooling": "mean"}}, InputSpec(11, 5, T))
    inputs = jnp.where(jnp.arange(T) < 6, 3, 0)[None]
    params = net.init(jax.random.key(0))
    assert rel_rms(net.apply(params, inputs), net.apply(params, inputs[:, :6])) < 1e-5


def test_dropout_follows_the_key():
    """Cross-attention has its own random numbers, with and without remat, and none where no key is given."""
    model = {**BASE, "positions": {"name": "none"}, "head": {"name": "classifier", "pooling": "mean"}, "dropout": 0.3}
    inputs = jax.random.randint(jax.random.key(1), (2, T), 1, 11)
    nets = [functional(model, InputSpec(11, 5, T), remat=remat) for remat in ("none", "full")]
    params = nets[0].init(jax.random.key(0))
    one, again = (jax.jit(net.apply)(params, inputs, None, jax.random.key(3)) for net in nets)
    np.testing.assert_allclose(one, again, atol=1e-5)
    other = jax.jit(nets[0].apply)(params, inputs, None, jax.random.key(4))
    assert float(jnp.abs(one - other).max()) > 1e-3
