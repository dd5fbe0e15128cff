"""FLOPs against XLA's own count, parameters against arrays that exist, rows that add up."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from arch import accounting, flops
from arch.model import functional
from arch.registry import TASKS
from arch.spec import InputSpec
from experiments import config
from tests.experiments.shipped import SOURCES


def xla(function, *args) -> float:
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (jnp.matmul, (shape(5, 7), shape(7, 11))),
        (lambda a, b: jnp.einsum("bij,bkj->bik", a, b), (shape(3, 5, 7), shape(3, 6, 7))),
        (lambda a: (a * 2 + 1).sum(0), (shape(13, 17),)),
        (lambda a, b: lax.conv(a, b, (1, 1), "VALID"), (shape(2, 3, 9, 8), shape(4, 3, 3, 2))),
        (
            lambda a, b: lax.conv_general_dilated(a, b, (1,), "VALID", feature_group_count=6),
            (shape(2, 6, 9), shape(6, 1, 3)),
        ),
        (jax.grad(lambda a, b: jnp.tanh(a @ b).sum()), (shape(5, 70), shape(70, 11))),
    ],
)
def test_counts_what_xla_counts(function, args):
    assert flops.count(function, *args).flops == pytest.approx(xla(function, *args), rel=0.02)


def test_loops_count_every_iteration():
    step = 2 * 8 * 8 * 8

    def looped(a):
        return lax.scan(lambda x, _: (x @ a, None), a, None, length=10)[0]

    assert flops.count(looped, shape(8, 8)).flops == pytest.approx(10 * step)
    assert flops.count(lambda a: lax.fori_loop(0, 5, lambda i, x: x @ a, a), shape(8, 8)).flops == 5 * step
    nested = flops.count(lambda a: lax.map(looped, a), shape(3, 8, 8))
    assert nested.flops == pytest.approx(30 * step)
    with pytest.raises(NotImplementedError, match="while"):
        flops.count(lambda a: lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ a, a), shape(8, 8))


def test_branches_count_the_dearest_side():
    def either(a):
        return lax.cond(a[0, 0] > 0, lambda x: x @ x, lambda x: x, a)

    assert 1024 <= flops.count(either, shape(8, 8)).flops <= 1024 + 10


def test_scopes_name_the_parts():
    def f(a):
        with jax.named_scope("first"):
            a = a @ a
        with jax.named_scope("second"):
            return jax.jit(jnp.matmul)(a, a)

    assert flops.count(f, shape(4, 4)).scopes == {"first": 128, "second": 128}


EXACT = {"softmax", "linear", "pooling", "mlp"}  # no loop in the bidirectional program, no Fourier transform


def kinds(source):
    return {part["kind"] for part in config.plain(config.configure(source))["model"]["parts"].values()}


@pytest.mark.parametrize(
    "source",
    [source for source in SOURCES if source.startswith(("configs/lra", "configs/quick")) and kinds(source) <= EXACT],
)
def test_models_agree_with_xla(source):
    """Forward FLOPs within 2 % wherever XLA's own count is exact: it counts a loop's body once, FFTs by a formula."""
    tree = config.plain(config.configure(source))
    for part in tree["model"]["parts"].values():
        if "implementation" in part:
            part["implementation"] = "ref" if part["kind"] == "softmax" else None  # one product, no loop over tiles
    spec = TASKS.build(tree["task"]).spec
    net = functional(tree["model"], spec)
    inputs = jax.ShapeDtypeStruct((1, spec.length), jnp.int32)
    want = xla(net.apply, net.abstract(), inputs)
    assert accounting.forward_flops(tree["model"], spec) == pytest.approx(want, rel=0.02)


def test_account_adds_up():
    tree = config.plain(config.configure("configs/quickstart.py:hybrid"))
    spec = TASKS.build(tree["task"]).spec
    found = accounting.account(tree["model"], spec)
    params = functional(tree["model"], spec).init(jax.random.key(0))
    assert found.params == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sum(part.params for part in found.parts) == found.params
    assert sum(part.flops for part in found.parts) == pytest.approx(found.flops)
    names = {part.name: part for part in found.parts}
    assert names["mixer pooling"].copies == names["mixer softmax"].copies == 2
    assert names["mixer softmax"].params == 2 * 4 * 64 * 64
    assert 2.5 < found.train_flops / found.flops < 4
    assert accounting.account(tree["model"], spec, remat="full").activation_bytes < found.activation_bytes


def test_decode_state():
    tree = config.plain(config.configure("configs/quickstart.py:softmax"))
    model = {**tree["model"], "causal": True, "head": {"name": "language_model"}}
    spec = TASKS.build(tree["task"]).spec
    found = accounting.account(model, spec)
    assert found.state_bytes == 4 * (2 * spec.length * 64 * 4 + 4) + 4  # keys and values, lengths
    assert accounting.account(tree["model"], spec).state_bytes is None


def test_activations_are_those_of_the_tokens():
    """Twice the tokens keep twice the bytes: parameters, which do not grow with them, are not counted."""
    tree = config.plain(config.configure("configs/quickstart.py:linear"))
    model = {**tree["model"], "head": {"name": "classifier", "pooling": "mean"}}
    short, long = (accounting.account(model, InputSpec(16, 10, n)).activation_bytes for n in (256, 512))
    assert long / short == pytest.approx(2, rel=0.02)


def test_scanned_layers_cost_what_unrolled_ones_do():
    model = {
        "topology": "metaformer",
        "width": 8,
        "depth": 6,
        "layers": ("full", "pool"),
        "parts": {"full": {"kind": "softmax", "num_heads": 2}, "pool": {"kind": "pooling"}, "mlp": {"kind": "mlp"}},
        "norm": {"name": "layer"},
        "positions": {"name": "sinusoid"},
        "head": {"name": "classifier"},
    }
    spec = InputSpec(vocab_size=7, num_classes=3, length=9)
    plain, scanned = (accounting.account({**model, "scan": scan}, spec) for scan in (False, True))
    assert scanned.parts == plain.parts
    assert [part.copies for part in plain.parts if part.name.startswith("mixer")] == [3, 3]
    assert (scanned.params, scanned.flops) == (plain.params, plain.flops)
