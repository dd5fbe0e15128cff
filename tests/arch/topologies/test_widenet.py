"""WideNet against a MetaFormer whose blocks are copies of the shared one, with the norms of each depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arch.accounting import account, size
from arch.errors import ConfigError
from arch.model import functional
from arch.moe import watch
from arch.spec import ImageSpec, InputSpec
from tests.numerics import rel_rms

SPEC = InputSpec(vocab_size=11, num_classes=11, length=10)
PARTS = {
    "mixer": {"kind": "softmax", "num_heads": 2},
    "moe": {"kind": "moe", "experts": 3, "top_k": 2, "hidden": 8, "capacity": 1.5, "balance": 1.0},
    "mlp": {"kind": "mlp", "hidden": 12},
}


def config(causal=True, **options):
    return {
        "topology": "widenet",
        "width": 8,
        "depth": 3,
        "parts": PARTS,
        "norm": {"name": "layer"},
        "positions": {"name": "sinusoid"},
        "head": {"name": "language_model"} if causal else {"name": "classifier", "pooling": "cls"},
        "causal": causal,
        **options,
    }


def started(net, seed=0):
    """Parameters moved away from their start, so that no two norms are alike."""
    params = net.init(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(tree, [a + 0.2 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves)])


def unrolled(params, depth):
    """The parameters of the MetaFormer: its blocks written out."""
    block = params["topology"]["block"]
    rest = {key: value for key, value in params["topology"].items() if key != "block"}

    def at(i):
        norms = {
            name: {**block[name], "norm": jax.tree.map(lambda a: a[i], block[name]["norm"])}
            for name in ("mix", "transform")
        }
        return {**block, **norms}

    return {**params, "topology": {**rest, "blocks": {str(i): at(i) for i in range(depth)}}}


def inputs(batch=3, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, SPEC.length), 1, SPEC.vocab_size)


@pytest.mark.parametrize(
    ("options", "remat"),
    [
        ({"causal": True}, "full"),
        ({"causal": False}, "none"),
        pytest.param({"causal": True, "channel": "mlp", "norm_placement": "post"}, "dots", marks=pytest.mark.slow),
    ],
)
def test_equals_blocks_with_shared_weights(options, remat):
    """Logits, losses, and gradients, those of the shared weights being sums over depth."""
    model = config(**options)
    other = {key: value for key, value in model.items() if key != "mixer"} | {"topology": "metaformer"}
    other |= {"layers": ("mixer",), "channel": model.get("channel", "moe")}
    net, plain = functional(model, SPEC, remat=remat), functional(other, SPEC)
    params, tokens = started(net), inputs()
    keep = jnp.arange(SPEC.length) < jnp.array([[10], [6], [1]])

    def total(net, params):
        logits, loss = net.apply_with_losses(params, tokens, keep)
        return jnp.mean(logits**2) + loss, (logits, loss)

    run = jax.jit(jax.grad(lambda p: total(net, p), has_aux=True))
    by_hand = jax.jit(jax.grad(lambda p: total(plain, unrolled(p, 3)), has_aux=True))
    (grads, (logits, loss)), (wanted, (want, want_loss)) = run(params), by_hand(params)
    assert rel_rms(logits, want) < 1e-5
    assert float(loss) == pytest.approx(float(want_loss), rel=1e-5)
    assert (float(loss) > 0) == (options.get("channel") != "mlp")
    for (path, got), expected in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wanted)):
        assert rel_rms(got, expected) < 1e-4, path


def test_routing_differs_from_depth_to_depth():
    net = functional(config(), SPEC)
    with watch() as seen:
        net.apply(started(net), inputs())
    assert len(seen) == 3
    assert not np.array_equal(seen[0].shares, seen[1].shares)
    assert all(layer.shares.sum() == pytest.approx(1.0) for layer in seen)


def test_steps_equal_the_parallel_form():
    """At a capacity that drops nothing; no logit sees a later token, at any capacity."""
    model = config(parts={**PARTS, "mixer": {"kind": "linear", "num_heads": 2}})
    net = functional(model, SPEC)
    params, tokens = started(net), inputs()
    logits = jax.jit(net.apply)(params, tokens)
    step = jax.jit(lambda p, x, state: net.module(p).step(x, state))
    state, outputs = net.module(params).init_state(3, SPEC.length), []
    for t in range(SPEC.length):
        y, state = step(params, tokens[:, t], state)
        outputs.append(y)
    assert rel_rms(jnp.stack(outputs, 1), logits) < 1e-4
    tight = functional(config(parts={**PARTS, "moe": {**PARTS["moe"], "capacity": 0.4}}), SPEC)
    run = jax.jit(tight.apply)
    later = run(params, tokens.at[:, 6:].set(3))
    np.testing.assert_allclose(later[:, :6], run(params, tokens)[:, :6], atol=1e-5)


def test_dropout_differs_from_depth_to_depth():
    """With every weight zero but one bias each depth adds the same, but for what dropout takes."""
    model = config(causal=False, dropout=0.5, channel="mlp", head={"name": "classifier", "pooling": "mean"})
    net = functional(model, SPEC)
    params = net.init(jax.random.key(0))
    zero = jax.tree.map(jnp.zeros_like, params["topology"]["block"])
    zero["channel"]["down"]["bias"] = jnp.ones((8,))
    params["topology"]["block"] = zero
    module = net.module(params, jax.random.key(3))
    x = jnp.zeros((2, SPEC.length, 8))
    module.topology.norm = None
    sums = module.topology(x)  # of three masks, each 0 or 2
    assert set(np.unique(sums).tolist()) == {0.0, 2.0, 4.0, 6.0}


def test_program_and_parameters_do_not_grow_with_depth():
    def lines(depth):
        net = functional(config(depth=depth), SPEC)
        jaxpr = jax.make_jaxpr(jax.grad(lambda p, x: net.apply_with_losses(p, x)[0].sum()))(net.abstract(), inputs())
        return str(jaxpr).count("\n"), size(net.abstract())

    (short, few), (long, many) = lines(2), lines(12)
    assert abs(long - short) < 5  # lines, which may wrap
    assert many - few == 10 * 2 * 2 * 8  # two norms a depth, scale and bias


def test_accounts_count_every_depth():
    """The FLOPs of the shared block are those of all its runs."""
    found = {d: account(config(depth=d), SPEC) for d in (1, 4)}
    rows = {d: {part.name: part for part in account.parts} for d, account in found.items()}
    for name in ("mixer softmax", "channel mixer moe"):
        assert rows[4][name].params == rows[1][name].params
        assert rows[4][name].flops == pytest.approx(4 * rows[1][name].flops)


def test_images_on_a_grid():
    """A mixture of experts and a mixer of sequences on a grid of patches."""
    spec = ImageSpec(height=8, width=8, channels=3, num_classes=5)
    model = config(causal=False, positions={"name": "none"}, head={"name": "classifier", "pooling": "mean"})
    net = functional({**model, "embedding": {"name": "patches", "size": 2}}, spec)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    assert net.apply(net.init(jax.random.key(1)), x).shape == (2, 5)


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"mixer": "mixr"}, "mixer"),
        ({"channel": "mixer"}, "channel"),
        ({"parts": {**PARTS, "mixer": {"kind": "fourier"}}}, "parts.mixer.kind"),
        ({"parts": {**PARTS, "mixer": {"kind": "pooling"}}, "positions": {"name": "rotary"}}, "positions.name"),
        ({"parts": {**PARTS, "moe": {"kind": "moe", "experts": 1}}}, "parts.moe.top_k"),
    ],
)
def test_refusals_name_the_field(options, path):
    with pytest.raises(ConfigError) as caught:
        functional(config(**options), SPEC)
    assert caught.value.path == path
