"""Optimisers and schedules against their closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arch.errors import ConfigError
from arch.registry import OPTIMIZERS, SCHEDULES
from experiments import optim

W, S, LR = 5, 40, 0.3


def lra(t, w, base, *, decay, cycle=100_000):
    """create_learning_rate_scheduler of the LRA release, with factors constant * linear_warmup * decay."""
    rate = base * min(1.0, t / w)
    if decay == "rsqrt":
        return rate / math.sqrt(max(t, w))
    return rate * max(0.0, 0.5 * (1 + math.cos(math.pi * (max(0.0, (t - w) / cycle) % 1.0))))


FORMS = {
    "constant": lambda t: LR * min(1, t / W),
    "cosine": lambda t: LR * min(1, t / W) * 0.5 * (1 + math.cos(math.pi * max(0, t - W) / (S - W))),
    "rsqrt": lambda t: lra(t, W, LR, decay="rsqrt"),
    "linear": lambda t: LR * min(1, t / W) * min(1, (S - t) / (S - W)),
}


def test_every_schedule_has_its_form_here():
    assert sorted(FORMS) == SCHEDULES.names()


@pytest.mark.parametrize("name", sorted(FORMS))
def test_schedule(name):
    schedule = SCHEDULES.build({"name": name, "warmup": W}, lr=LR, steps=S)
    got = [float(jax.jit(schedule)(jnp.int32(t))) for t in range(S)]
    np.testing.assert_allclose(got, [FORMS[name](t) for t in range(S)], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", sorted(FORMS))
def test_schedule_without_warmup_starts_at_its_base(name):
    schedule = SCHEDULES.build({"name": name}, lr=LR, steps=S)
    assert float(schedule(jnp.int32(0))) == pytest.approx(LR)
    assert math.isfinite(float(schedule(jnp.int32(S))))


def test_long_range_arena_schedules():
    listops = SCHEDULES.build({"name": "rsqrt", "warmup": 1000}, lr=0.05, steps=5000)
    assert float(listops(1000)) == pytest.approx(1.58e-3, rel=2e-3)
    assert float(listops(5000)) == pytest.approx(7.1e-4, rel=5e-3)
    image = SCHEDULES.build({"name": "cosine", "warmup": 175, "cycle": 10_000}, lr=5e-4, steps=35_000)
    for t in (0, 100, 175, 5000, 10_174, 10_175, 10_180, 34_999):  # a restart at 175 + 10000
        assert float(image(t)) == pytest.approx(lra(t, 175, 5e-4, decay="cosine", cycle=10_000), rel=1e-4, abs=1e-10)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_warmup_must_leave_room(name):
    with pytest.raises(ConfigError, match=r"optimizer\.schedule\.warmup: 40 leaves no step of 40"):
        optim.build({"name": "sgd", **COMMON, "schedule": {"name": name, "warmup": 40}}, 40)


COMMON = {"lr": LR, "schedule": {"name": "constant"}, "clip": None, "accumulate": 1, "ema": None}
PARAMS = {"kernel": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), "bias": np.array([0.5, -2, 3], np.float32)}


def run(config, updates=4):
    """Parameters after some updates with gradients p * t - 0.1, from optax and ours."""
    optimizer = optim.build({**COMMON, **config}, S)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.direction.init(params)
    for t in range(updates):
        grads = jax.tree.map(lambda p, t=t: p * t - 0.1, params)
        direction, state = optimizer.direction.update(grads, state, params)
        params = optim.apply(params, direction, optimizer.schedule(t))
    return params


def reference(rule, updates=4):
    """The same in numpy, a parameter at a time: rule(p, g, t, memory) -> p."""
    out = {}
    for name, p in PARAMS.items():
        p, memory = p.astype(np.float64), {"m": 0.0, "v": 0.0}
        for t in range(updates):
            p = rule(name, p, p * t - 0.1, t, memory)
        out[name] = p
    return out


def adam_rule(b1, b2, eps, decay, only_matrices=False):
    """flax.optim.Adam's apply_param_gradient, which the LRA release uses."""

    def rule(name, p, g, t, memory):
        memory["m"] = b1 * memory["m"] + (1 - b1) * g
        memory["v"] = b2 * memory["v"] + (1 - b2) * g * g
        m, v = memory["m"] / (1 - b1 ** (t + 1)), memory["v"] / (1 - b2 ** (t + 1))
        wd = 0 if only_matrices and name == "bias" else decay
        return p - LR * m / (np.sqrt(v) + eps) - LR * wd * p

    return rule


def lion_rule(name, p, g, t, memory):
    c = 0.9 * memory["m"] + 0.1 * g
    memory["m"] = 0.99 * memory["m"] + 0.01 * g
    return p - LR * (np.sign(c) + 0.1 * p)


def sgd_rule(nesterov):
    def rule(name, p, g, t, memory):
        g = g + 0.1 * p
        memory["m"] = 0.9 * memory["m"] + g
        return p - LR * (g + 0.9 * memory["m"] if nesterov else memory["m"])

    return rule


def gradient_rule(name, p, g, t, memory):
    return p - LR * g


CASES = [
    ({"name": "sgd"}, gradient_rule),
    ({"name": "adam", "b2": 0.98}, adam_rule(0.9, 0.98, 1e-8, 0)),
    ({"name": "adamw", "weight_decay": 0.1}, adam_rule(0.9, 0.98, 1e-9, 0.1)),
    ({"name": "adamw", "weight_decay": 0.1, "decay": "matrices"}, adam_rule(0.9, 0.98, 1e-9, 0.1, True)),
    ({"name": "lion", "weight_decay": 0.1}, lion_rule),
    ({"name": "sgd", "momentum": 0.9, "weight_decay": 0.1}, sgd_rule(False)),
    ({"name": "sgd", "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}, sgd_rule(True)),
]


@pytest.mark.parametrize(("config", "rule"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_optimizer(config, rule):
    got, want = run(config), reference(rule)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_every_optimizer_is_tried():
    assert {config["name"] for config, _ in CASES} == set(OPTIMIZERS.names())


def test_nesterov_needs_momentum():
    with pytest.raises(ConfigError, match=r"optimizer\.nesterov: needs momentum"):
        optim.build({**COMMON, "name": "sgd", "nesterov": True}, S)


def test_average_forgets_its_start():
    mean, params = {"a": jnp.float32(100.0)}, {"a": jnp.float32(1.0)}
    for t in range(50):
        mean = optim.average(mean, params, 0.999, t)
    assert float(mean["a"]) == pytest.approx(1.0, abs=0.05)  # a plain average would stand at 95
    assert float(optim.average({"a": 0.0}, {"a": 1.0}, 0.9, 10_000)["a"]) == pytest.approx(0.1)
