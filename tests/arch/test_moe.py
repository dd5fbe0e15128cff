"""The mixture of experts against a loop over tokens in NumPy float64; capacity, causality, padding, randomness."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arch.auxiliary import take_losses
from arch.errors import ConfigError
from arch.flops import count
from arch.layers import cast
from arch.model import functional, to_nested
from arch.moe import MoE, capacity_of, watch
from arch.spec import InputSpec
from tests.numerics import rel_rms

ROOT = Path(__file__).resolve().parents[2]
D = 6


def make(seed=0, **options):
    """A mixture whose every parameter is away from zero, and its parameters as nested dicts."""
    graph, state = nnx.split(MoE(D, rngs=nnx.Rngs(params=seed, dropout=seed), **options))
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    number = [jnp.issubdtype(a.dtype, jnp.floating) for a in leaves]
    leaves = [0.6 * jax.random.normal(k, a.shape) if n else a for k, a, n in zip(keys, leaves, number)]
    module = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
    module.eval()
    return module


def apply(module, x, keep=None, params=None):
    """Output and added losses, as a pure function."""
    graph, state, rest = nnx.split(module, nnx.Param, ...)
    return _apply(graph, state if params is None else params, rest, x, keep)


@functools.partial(jax.jit, static_argnums=0)
def _apply(graph, params, rest, x, keep):
    copy = nnx.merge(graph, params, rest)
    y = copy(x, keep=keep)
    return y, take_losses(copy)


def gelu(a):
    return 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))


def oracle(params, x, keep, *, k, capacity=1.25, renormalize=False, balance=0.01, z_loss=0.0, gated=False):
    """One token at a time, in float64: the docstring's equations."""
    router = params["exact"]["router"]
    E = router.shape[1]
    B, T, _ = x.shape
    places = max(1, min(T, int(np.ceil(np.round(capacity * k * T / E, 6)))))
    y, fall, mean, z, kept = np.zeros_like(x), np.zeros(E), np.zeros(E), 0.0, 0
    for b in range(B):
        taken = np.zeros(E, int)
        for t in range(T):
            if not keep[b, t]:
                continue
            logits = x[b, t] @ router
            p = np.exp(logits - logits.max())
            p /= p.sum()
            best = np.argsort(-p, kind="stable")[:k]
            kept, mean, z = kept + 1, mean + p, z + (np.log(np.exp(logits - logits.max()).sum()) + logits.max()) ** 2
            for e in best:
                fall[e] += 1 / k
                if taken[e] == places:
                    continue
                taken[e] += 1
                up = x[b, t] @ params["up"]["kernel"][e]
                if gated:
                    gate = x[b, t] @ params["gate"]["kernel"][e]
                    hidden = gate / (1 + np.exp(-gate)) * up
                else:
                    hidden = gelu(up + params["up"]["bias"][e])
                out = hidden @ params["down"]["kernel"][e] + (0 if gated else params["down"]["bias"][e])
                y[b, t] += out * p[e] / (p[best].sum() if renormalize else 1)
    kept = max(kept, 1)
    return y, balance * E * (fall / kept) @ (mean / kept) + z_loss * z / kept


def plain(module):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), to_nested(nnx.state(module, nnx.Param)))


CASES = [  # experts that do not divide the choices; k of 1, 2, all; tight and loose capacity
    ({"experts": 3, "top_k": 2, "hidden": 5}, (2, 7)),
    ({"experts": 4, "top_k": 1, "hidden": 5, "capacity": 0.5}, (2, 9)),
    ({"experts": 5, "top_k": 2, "hidden": 4, "activation": "swiglu", "renormalize": True, "z_loss": 0.1}, (1, 8)),
    ({"experts": 3, "top_k": 3, "hidden": 4, "capacity": 0.4, "balance": 0.5}, (3, 5)),
    ({"experts": 2, "top_k": 1, "hidden": 3}, (3, 1)),
]


@pytest.mark.parametrize(("options", "shape"), CASES)
def test_matches_the_loop_over_tokens(options, shape):
    """Forward, losses, and every gradient: against differences of the oracle along random directions."""
    module = make(**options)
    x = np.asarray(jax.random.normal(jax.random.key(5), (*shape, D)), np.float64)
    keep = np.asarray(jax.random.uniform(jax.random.key(6), shape)) < 0.8
    weigh = np.asarray(jax.random.normal(jax.random.key(7), x.shape), np.float64)
    known = {key: options[key] for key in ("capacity", "renormalize", "balance", "z_loss") if key in options}

    def run(params, x):
        return oracle(params, x, keep, k=options["top_k"], gated=options.get("activation") == "swiglu", **known)

    want, want_loss = run(plain(module), x)

    def scalar(params, x):
        y, loss = apply(module, x, jnp.asarray(keep), params)
        return (y * weigh).sum() + 3.0 * loss, (y, loss)

    run_grad = jax.jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))
    (grads, dx), (y, loss) = run_grad(nnx.state(module, nnx.Param), jnp.asarray(x, jnp.float32))
    assert rel_rms(y, want) < 1e-5
    assert float(loss) == pytest.approx(want_loss, rel=1e-5)
    flat = {**{str(p): g for p, g in jax.tree_util.tree_leaves_with_path(to_nested(grads))}, "x": dx}
    params = plain(module)
    for name in flat:
        rng = np.random.default_rng(0)
        for _ in range(3):
            way = rng.standard_normal(np.shape(flat[name]))

            def moved(step, name=name, way=way):
                at = jax.tree_util.tree_map_with_path(lambda p, a: a + step * way if str(p) == name else a, params)
                y, loss = run(at, x + step * way if name == "x" else x)
                return (y * weigh).sum() + 3.0 * loss

            got = float((np.asarray(flat[name], np.float64) * way).sum())
            assert got == pytest.approx((moved(1e-6) - moved(-1e-6)) / 2e-6, rel=1e-3, abs=2e-4), name


def test_capacity_is_rounded_up_and_bounded():
    assert capacity_of(1.25, 2, 8, 16) == 5
    assert capacity_of(1.2, 2, 4, 10) == 6  # 1.2 x 2 x 10 / 4 is 6 and not a little more
    assert capacity_of(0.01, 1, 8, 16) == 1
    assert capacity_of(9.0, 2, 4, 16) == 16
    assert capacity_of(1.0, 1, 4, 0) == 1


def only_expert(module, e):
    """Every token prefers expert e, then the others in order."""
    router = jnp.zeros_like(module.exact.router[...]).at[0].set(-jnp.arange(module.experts, dtype=jnp.float32))
    module.exact.router[...] = router.at[0, e].set(5.0)
    return module


def test_a_full_expert_drops_later_tokens_and_padding_takes_no_place():
    module = only_expert(make(experts=4, top_k=1, hidden=5, capacity=1.0), 2)
    x = jax.random.normal(jax.random.key(1), (2, 8, D)).at[..., 0].set(1.0)
    keep = jnp.array([[True] * 8, [False, True, False, True, True, True, True, True]])
    y, _ = apply(module, x, keep)
    moved = np.asarray(jnp.abs(y).max(axis=-1) > 0)
    assert moved.tolist() == [[True] * 2 + [False] * 6, [False, True, False, True] + [False] * 4]
    with watch() as seen:
        module(x, keep=keep)
    assert seen[0].largest == 1.0
    assert seen[0].dropped == pytest.approx(10 / 14)


def test_causal_and_independent_of_other_rows():
    """A later token and another row change nothing, though capacity is tight."""
    module = make(experts=4, top_k=2, hidden=5, capacity=0.6)
    x = jax.random.normal(jax.random.key(2), (3, 10, D))
    y, _ = apply(module, x)
    assert 0 < float(jnp.mean(jnp.abs(y).max(axis=-1) == 0)) < 1  # some are dropped
    later, _ = apply(module, x.at[:, 6:].set(jax.random.normal(jax.random.key(3), (3, 4, D))))
    np.testing.assert_array_equal(later[:, :6], y[:, :6])
    order = jnp.array([2, 0, 1])
    np.testing.assert_allclose(apply(module, x[order])[0], y[order], atol=1e-6)
    np.testing.assert_allclose(apply(module, x[:1])[0], y[:1], atol=1e-6)


def test_steps_equal_the_parallel_form_where_nothing_is_dropped():
    module = make(experts=4, top_k=2, hidden=5, capacity=2.0)
    x = jax.random.normal(jax.random.key(2), (3, 5, D))
    steps = jnp.stack([apply(module, x[:, t])[0] for t in range(5)], axis=1)
    np.testing.assert_allclose(steps, apply(module, x)[0], atol=1e-5)
    np.testing.assert_allclose(apply(module, x[0, 0])[0], steps[0, 0], atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 1), (2, 2, 3), (1, 2, 2, 2)])
def test_any_grid_and_empty_ones(shape):
    """A grid is a row in row-major order."""
    module = make(experts=3, top_k=2, hidden=4, capacity=0.7)
    x = jax.random.normal(jax.random.key(2), (*shape, D))
    y, loss = apply(module, x, jnp.ones(shape, bool))
    assert y.shape == x.shape
    assert bool(jnp.isfinite(loss))
    if len(shape) > 2:
        flat = apply(module, x.reshape(shape[0], -1, D))[0]
        np.testing.assert_allclose(y.reshape(flat.shape), flat, atol=1e-6)


def test_all_padding_is_finite():
    module = make(experts=3, top_k=2, hidden=4, z_loss=1.0)
    x = jnp.ones((2, 4, D))
    y, loss = apply(module, x, jnp.zeros((2, 4), bool))
    assert float(jnp.abs(y).max()) == 0.0
    assert float(loss) == 0.0


def test_bf16_keeps_a_float32_router():
    """The router's parameters and arithmetic stay float32, so that the same tokens go the same way."""
    module = make(experts=4, top_k=2, hidden=8)
    x = jax.random.normal(jax.random.key(2), (4, 16, D)).astype(jnp.bfloat16)
    low = cast(nnx.state(module, nnx.Param), jnp.bfloat16)
    assert low["exact"]["router"][...].dtype == jnp.float32
    assert low["up"]["kernel"][...].dtype == jnp.bfloat16
    there = nnx.merge(nnx.graphdef(module), low)
    np.testing.assert_array_equal(there.route(x).place, module.route(x.astype(jnp.float32)).place)
    y, loss = apply(module, x, params=low)
    assert y.dtype == jnp.bfloat16
    assert loss.dtype == jnp.float32
    assert rel_rms(y, apply(module, x.astype(jnp.float32))[0]) < 2e-2


def test_balance_is_one_when_even_and_e_when_one_expert_has_all():
    x = jnp.ones((2, 8, D))
    even = make(experts=4, top_k=1, hidden=3, balance=1.0)
    even.exact.router[...] = jnp.zeros((D, 4)).at[:4].set(50 * jnp.eye(4))
    one_hot = jnp.tile(jnp.eye(4, D), (2, 2, 1))
    assert float(apply(even, one_hot)[1]) == pytest.approx(1.0, abs=1e-5)
    alone = make(experts=4, top_k=1, hidden=3, balance=1.0)
    alone.exact.router[...] = jnp.zeros((D, 4)).at[:, 1].set(50.0)
    assert float(apply(alone, x)[1]) == pytest.approx(4.0, abs=1e-5)


def test_random_only_in_training():
    module = make(experts=4, top_k=2, hidden=5, jitter=0.3, noise=1.0)
    x = jax.random.normal(jax.random.key(2), (2, 16, D))
    np.testing.assert_array_equal(module(x), module(x))
    module.train()
    assert float(jnp.abs(module(x) - module(x)).max()) > 1e-3
    quiet = MoE(D, rngs=nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.state(quiet, nnx.RngState))


@pytest.mark.parametrize(
    ("options", "path"),
    [({"experts": 2, "top_k": 3}, "top_k"), ({"top_k": 1, "renormalize": True}, "renormalize")],
)
def test_refusals(options, path):
    with pytest.raises(ConfigError) as caught:
        MoE(D, rngs=nnx.Rngs(0), **options)
    assert caught.value.path == path


def test_work_does_not_grow_with_experts():
    """FLOPs of 32 experts over those of 4: the router's alone grow."""

    def flops(experts):
        module = nnx.eval_shape(lambda: MoE(64, experts=experts, top_k=2, hidden=256, rngs=nnx.Rngs(0)))
        graph, params = nnx.split(module)
        x = jax.ShapeDtypeStruct((1, 256, 64), jnp.float32)
        return count(lambda p, x: nnx.merge(graph, p)(x), params, x).flops

    dense = 2 * 2 * 256 * 64 * 256  # of one feed-forward
    assert flops(4) == pytest.approx(2 * 1.25 * dense, rel=0.05)
    assert flops(32) < 1.15 * flops(4)


MODEL = {
    "topology": "metaformer",
    "width": 8,
    "depth": 2,
    "layers": ("full",),
    "channel": "moe",
    "parts": {
        "full": {"kind": "softmax", "num_heads": 2},
        "moe": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 8, "capacity": 0.8, "balance": 1.0},
    },
    "norm": {"name": "layer"},
    "positions": {"name": "sinusoid"},
    "head": {"name": "classifier", "pooling": "mean"},
}
SPEC = InputSpec(vocab_size=11, num_classes=3, length=12)


@pytest.mark.parametrize("options", [{}, {"scan": True}])
def test_in_a_model(options):
    """The loss of every layer comes out, with remat and scan too; padding reaches nothing; every layer is watched."""
    net = functional({**MODEL, **options}, SPEC)
    params = net.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 12), 1, 11)
    keep = jnp.arange(12) < jnp.array([[12], [7], [3], [1]])
    with watch() as seen:
        logits, loss = jax.jit(net.apply_with_losses)(params, tokens, keep)
    assert len(seen) == 2
    assert all(0.25 <= layer.largest <= 0.5 and 0 <= layer.dropped < 1 for layer in seen)
    assert 2 * 0.9 < float(loss) < 2 * 2.0
    run = jax.jit(net.apply_with_losses)
    again, other = run(params, jnp.where(keep, tokens, 3), keep)
    np.testing.assert_allclose(again, logits, atol=1e-5)
    assert float(other) == pytest.approx(float(loss), rel=1e-5)
    remat = functional({**MODEL, **options}, SPEC, remat="full")
    added, grads = jax.jit(jax.value_and_grad(lambda p: remat.apply_with_losses(p, tokens, keep)[1]))(params)
    assert float(added) == pytest.approx(float(loss), rel=1e-5)
    routers = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads) if "router" in str(path)]
    assert routers
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in routers)


# Runs in a process of its own: the number of host devices is fixed when JAX starts.
PROGRAM = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from arch.model import functional
from experiments.sharding import AXES, make_mesh, parameter_specs, paths
from tests.arch.test_moe import MODEL, SPEC

net = functional(MODEL, SPEC)
params = net.init(jax.random.key(0))
tokens = jax.random.randint(jax.random.key(1), (16, 12), 1, 11)
keep = jnp.arange(12) < jax.random.randint(jax.random.key(2), (16, 1), 1, 13)

def loss(params, tokens, keep):
    logits, added = net.apply_with_losses(params, tokens, keep)
    return jnp.sum(logits**2) / 16 + added, added

for sizes in ({"data": 1}, {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
    sizes = {axis: sizes.get(axis, 1) for axis in AXES}
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    specs = parameter_specs(params, (), mesh)
    where = jax.tree_util.tree_map_with_path(
        lambda keys, a: NamedSharding(mesh, specs["/".join(k.key for k in keys)]), params)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(loss, has_aux=True), in_shardings=(where, rows, rows))
        (total, added), grads = run(jax.device_put(params, where), *jax.device_put((tokens, keep), rows))
    flat = {path: np.asarray(leaf).ravel().tolist() for path, leaf in paths(grads).items()}
    kernel = next(str(specs[path]) for path in specs if path.endswith("channel/up/kernel"))
    print(json.dumps({"total": float(total), "added": float(added), "grads": flat, "kernel": kernel}))
"""


def test_eight_devices_equal_one():
    """The balance is that of the whole batch: loss and gradients are the same however rows and kernels are split."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, *others = [json.loads(line) for line in done.stdout.splitlines()]
    for found in others:
        assert found["added"] == pytest.approx(one["added"], rel=1e-5)
        assert found["total"] == pytest.approx(one["total"], rel=1e-5)
        for path, grad in found["grads"].items():
            assert rel_rms(grad, one["grads"][path]) < 1e-4, path
    assert "None, 'fsdp', 'tensor'" in others[1]["kernel"]  # the axis of experts stays whole
