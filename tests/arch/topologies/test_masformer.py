"""MASFormer: which layers are full, what each token can see, and that it is a stack like any other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arch.errors import ConfigError
from arch.model import functional
from arch.spec import InputSpec
from arch.topologies.masformer import full_layers

SPEC = InputSpec(vocab_size=11, num_classes=11, length=12)
SOFTMAX, NEAR = {"kind": "softmax", "num_heads": 2}, {"kind": "local", "num_heads": 2, "block": 4}


def model(full=SOFTMAX, near=NEAR, positions="rotary", **options):
    return {
        "topology": "masformer",
        "width": 8,
        "depth": 3,
        "num_full": 1,
        "parts": {"full": full, "near": near, "mlp": {"kind": "mlp", "hidden": 8}},
        "norm": {"name": "layer"},
        "positions": {"name": positions},
        "head": {"name": "language_model"},
        "causal": True,
        **options,
    }


def inputs(batch=2, length=SPEC.length, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 1, SPEC.vocab_size)


@pytest.mark.parametrize(
    ("depth", "num_full", "where", "wanted"),
    [
        (24, 4, "first", (0, 1, 2, 3)),
        (24, 4, "last", (20, 21, 22, 23)),
        (24, 4, "middle", (10, 11, 12, 13)),
        (24, 4, "even", (3, 9, 15, 21)),
        (5, 2, "middle", (1, 2)),  # one fewer before than behind
        (5, 2, "even", (1, 3)),
        (3, 1, "even", (1,)),
        (2, 1, "middle", (0,)),
        (1, 1, "even", (0,)),
        (6, 2, (5, 0), (0, 5)),
        (6, None, (-1, 2), (2, 5)),
        (6, None, (), ()),
        (6, 0, (), ()),
    ],
)
def test_full_layers(depth, num_full, where, wanted):
    assert full_layers(depth, num_full, where) == wanted


@pytest.mark.parametrize("where", ["first", "last", "middle", "even"])
@pytest.mark.parametrize("depth", [1, 2, 7, 24])
def test_as_many_layers_as_asked_for_none_to_all(depth, where):
    for num_full in range(depth + 1):
        found = full_layers(depth, num_full, where)
        assert len(set(found)) == num_full
        assert list(found) == sorted(found)
        assert all(0 <= i < depth for i in found)


@pytest.mark.parametrize(
    ("num_full", "where", "field", "problem"),
    [
        (4, "first", "num_full", "4 of 3 layers cannot be full; use 0 to 3"),
        (None, "even", "num_full", "missing; where='even' needs a number from 0 to depth 3"),
        (None, (3,), "where", "there is no layer 3; depth is 3"),
        (None, (-4,), "where", "there is no layer -4; depth is 3"),
        (None, (2, -1), "where", r"\(2, -1\) names a layer twice; name each once"),
        (1, (0, 2), "num_full", "1, but where lists 2 layers; leave num_full None"),
    ],
)
def test_what_cannot_be_chosen(num_full, where, field, problem):
    with pytest.raises(ConfigError, match=f"^{field}: {problem}"):
        functional(model(num_full=num_full, where=where), SPEC)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"full": {"kind": "fourier"}}, r"^parts\.full\.kind: fourier has no causal form; choose another mixer"),
        ({"near": {"kind": "mlp"}}, r"^near: part 'near' is of kind 'mlp', which is no mixer"),
        (
            {"full": {"kind": "mamba"}, "near": {"kind": "pooling"}},
            r"^positions\.name: rotary needs a mixer that turns",
        ),
    ],
)
def test_what_cannot_hold_a_role(options, message):
    with pytest.raises(ConfigError, match=message):
        functional(model(**options), SPEC)


def test_a_role_is_a_part_by_name():
    config = model()
    config["parts"] = {"wide": SOFTMAX, "close": NEAR, "mlp": {"kind": "mlp", "hidden": 8}}
    with pytest.raises(ConfigError, match=r"^full: unknown part 'full'"):
        functional(config, SPEC)
    functional({**config, "full": "wide", "near": "close"}, SPEC)


@pytest.mark.parametrize(("where", "wanted"), [("first", "sll"), ("middle", "lsl"), ((-1, 0), "sls")])
def test_the_layers_hold_the_mixers_of_their_roles(where, wanted):
    net = functional(model(where=where, num_full=wanted.count("s")), SPEC)
    blocks = net.module(net.init(jax.random.key(0))).topology.blocks
    assert [type(block.mixer).__name__ for block in blocks] == [{"s": "Softmax", "l": "Local"}[x] for x in wanted]


@pytest.mark.parametrize("causal", [True, False])
def test_equals_a_metaformer_of_the_same_layers(causal):
    """The same parameters in the same places, and the same logits."""
    head = {"name": "language_model"} if causal else {"name": "classifier", "pooling": "mean"}
    mine = functional(model(where="middle", causal=causal, head=head), SPEC)
    other = {k: v for k, v in model(causal=causal, head=head).items() if k != "num_full"}
    other = functional({**other, "topology": "metaformer", "layers": ("near", "full", "near")}, SPEC)
    params = mine.init(jax.random.key(1))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, other.abstract())
    np.testing.assert_array_equal(mine.apply(params, inputs()), other.apply(params, inputs()))


def reach(**options):
    """[query, key]: a change of the token at key changes the logits at query."""
    net = functional(model(**options), SPEC)
    params = net.init(jax.random.key(2))
    apply = jax.jit(lambda x: net.apply(params, x))
    x = inputs(batch=1)
    changed = jnp.where(jnp.eye(SPEC.length, dtype=bool), x % (SPEC.vocab_size - 1) + 1, x)
    difference = jax.vmap(lambda row: apply(row[None])[0] - apply(x)[0])(changed)
    return np.abs(difference).max(-1).T > 1e-4


def test_near_layers_see_their_block_and_one_full_layer_sees_all_before():
    t = np.arange(SPEC.length)
    before = t[:, None] >= t[None]
    np.testing.assert_array_equal(reach(num_full=0), before & (t[:, None] // 4 == t[None] // 4))
    np.testing.assert_array_equal(reach(where="last"), before)  # nothing later leaks in


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positions": "learned", "where": "last"},
        {"near": {"kind": "local", "num_heads": 2, "window": 3}, "norm_placement": "post"},
        {"full": {"kind": "mamba"}, "near": {"kind": "linear", "num_heads": 2}, "positions": "none", "channel": None},
        {"scan": True, "depth": 5, "num_full": 2},
    ],
)
def test_step_by_step_equals_all_at_once(options):
    net = functional(model(**options), SPEC)
    params, x = net.init(jax.random.key(3)), inputs()
    module = net.module(params)
    state, logits = module.init_state(2, SPEC.length), []
    step = jax.jit(lambda token, state: net.module(params).step(token, state))
    for token in x.T:
        y, state = step(token, state)
        logits.append(y)
    np.testing.assert_allclose(jnp.stack(logits, 1), net.apply(params, x), atol=2e-5)


def runs(depth, where, num_full=2):
    return functional(model(depth=depth, num_full=num_full, where=where, scan=True), SPEC)


def test_scanned_layers_compute_what_single_ones_do():
    """Two runs, the full layers and the near ones, each with its parameters stacked."""
    net, plain = runs(5, "first"), functional(model(depth=5, num_full=2), SPEC)
    params = plain.init(jax.random.key(4))
    blocks = [params["topology"]["blocks"][str(i)] for i in range(5)]
    stacked = {}
    for i, run in enumerate((blocks[:2], blocks[2:])):
        stacked[str(i)] = {"blocks": {"0": jax.tree.map(lambda *leaves: jnp.stack(leaves), *run)}}
    mine = {**params, "topology": {**params["topology"], "blocks": stacked}}
    assert jax.tree.map(jnp.shape, mine) == jax.tree.map(jnp.shape, net.abstract())
    np.testing.assert_allclose(net.apply(mine, inputs()), plain.apply(params, inputs()), atol=1e-5)


@pytest.mark.parametrize(("where", "num_runs"), [("first", 2), ("last", 2), ("middle", 3), ("even", 1)])
def test_what_is_compiled_does_not_grow_with_depth(where, num_runs):
    """24 layers trace to as many equations as 12, gradient included: loops of them, as many as there are runs."""
    sizes = []
    for depth in (12, 24):
        net = runs(depth, where, num_full=depth // 6)
        assert len(net.abstract()["topology"]["blocks"]) == num_runs
        loss = jax.make_jaxpr(jax.grad(lambda p, net=net: net.apply(p, inputs()).sum()))(net.abstract())
        sizes.append(str(loss).count("\n"))
    assert sizes[1] <= 1.02 * sizes[0]
