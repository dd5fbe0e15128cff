"""The diffusion objectives against their equations, written out in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import diffusion, optim, step
from experiments.objectives import Classify

B, SHAPE = 6, (4, 4, 3)


def make_batch(rows=B, start=0):
    rng = np.random.default_rng(start)
    return {
        "inputs": jnp.asarray(rng.normal(size=(rows, *SHAPE)).astype(np.float32)),
        "label": jnp.asarray(rng.integers(0, 10, rows).astype(np.int32)),
        "weight": jnp.asarray([1, 1, 0, 1, 0.5, 1][:rows], jnp.float32),
        "index": jnp.arange(start, start + rows),
    }


class Recorder:
    """A network that says a fixed thing and keeps what it was asked."""

    def __init__(self, said=0.25):
        self.said = said

    def __call__(self, inputs, keep, key, *, time, label):
        self.inputs, self.time, self.label, self.key = inputs, time, label, key
        return jnp.full_like(inputs, self.said)


@pytest.mark.parametrize("key", [None, 3])
@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
def test_flow_matching_loss(times, key):
    """eps = (x_t - (1 - t) x_0) / t; the loss is the weighted sum of the mean over pixels of (said - (eps - x_0))^2."""
    objective, batch, network = diffusion.FlowMatching(times=times), make_batch(), Recorder()
    loss, weight = objective(network, batch, None if key is None else jax.random.key(key))
    x, t = np.asarray(batch["inputs"], float), np.asarray(network.time, float)[:, None, None, None]
    eps = (np.asarray(network.inputs, float) - (1 - t) * x) / t
    each = ((0.25 - (eps - x)) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(loss, (each * np.asarray(batch["weight"])).sum(), rtol=1e-4)
    np.testing.assert_allclose(weight, 4.5)
    assert abs(eps.mean()) < 0.25
    assert eps.std() == pytest.approx(1, abs=0.15)
    assert network.label is None


@pytest.mark.parametrize("predict", ["noise", "velocity"])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_ddpm_loss(schedule, predict):
    objective, batch, network = (
        diffusion.DDPM(timesteps=20, schedule=schedule, predict=predict),
        make_batch(),
        Recorder(),
    )
    loss, _ = objective(network, batch, jax.random.key(3))
    t = np.asarray(network.time) * 20 - 1
    np.testing.assert_allclose(t, np.round(t), atol=1e-5)
    assert t.min() >= 0
    a = np.asarray(diffusion.alpha_bars(schedule, 20), float)[np.round(t).astype(int)][:, None, None, None]
    x = np.asarray(batch["inputs"], float)
    eps = (np.asarray(network.inputs, float) - np.sqrt(a) * x) / np.sqrt(1 - a)
    target = eps if predict == "noise" else np.sqrt(a) * eps - np.sqrt(1 - a) * x
    each = ((0.25 - target) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(loss, (each * np.asarray(batch["weight"])).sum(), rtol=1e-4)


@pytest.mark.parametrize("total", [1000, 50])
def test_cosine_schedule(total):
    """alpha_bar(n) = f(n) / f(0), until the cut of beta at 0.999 which touches the last step alone."""
    n = np.arange(total + 1)
    f = np.cos((n / total + 0.008) / 1.008 * np.pi / 2) ** 2
    found = np.asarray(diffusion.alpha_bars("cosine", total), float)
    np.testing.assert_allclose(found[:-1], (f / f[0])[1:-1], rtol=2e-3, atol=1e-8)
    np.testing.assert_allclose(found[-1], found[-2] * 1e-3, rtol=1e-3)


def test_linear_schedule():
    beta = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(diffusion.alpha_bars("linear", 1000), np.cumprod(1 - beta), rtol=1e-4)
    ends = [float(diffusion.alpha_bars("linear", total)[-1]) for total in (250, 1000)]
    np.testing.assert_allclose(np.log(ends[0]), np.log(ends[1]), rtol=0.05)  # as much noise in fewer steps


@pytest.mark.parametrize("objective", [diffusion.FlowMatching(), diffusion.DDPM(timesteps=10)])
def test_evaluation_is_a_function_of_the_examples(objective):
    """The same rows in one batch, in two, and at other places: the same noise and times."""
    batch = make_batch()
    whole = objective(lambda x, keep, key, **c: 0.1 * x, batch, None)
    parts = [{name: x[rows] for name, x in batch.items()} for rows in (np.asarray([4, 1]), np.asarray([5, 0, 3, 2]))]
    split = [objective(lambda x, keep, key, **c: 0.1 * x, part, None) for part in parts]
    np.testing.assert_allclose(whole, np.sum(split, axis=0), rtol=1e-6)
    moved = objective(lambda x, keep, key, **c: 0.1 * x, {**batch, "index": batch["index"] + 1}, None)
    assert abs(float(moved[0] - whole[0])) > 1e-3


def test_times_of_evaluation_fill_the_range():
    """Any 50 in a row lie about evenly: no gap above 3 / 50, as golden-ratio points have it."""
    for start in (0, 1234, 1_000_000):
        points = np.sort(np.asarray(diffusion.golden(jnp.arange(start, start + 50))))
        assert points[0] > 0
        assert points[-1] < 1
        assert np.diff(points).max() < 3 / 50


def test_logit_normal_times():
    seen = Recorder()
    batch = {"inputs": jnp.zeros((20_000, 1, 1, 1)), "weight": jnp.ones(20_000)}
    diffusion.FlowMatching(times="logit_normal", logit_mean=-0.5, logit_std=0.8)(seen, batch, jax.random.key(0))
    logit = np.log(np.asarray(seen.time) / (1 - np.asarray(seen.time)))
    assert logit.mean() == pytest.approx(-0.5, abs=0.03)
    assert logit.std() == pytest.approx(0.8, abs=0.03)


def test_labels_are_hidden_in_training_alone():
    batch = {name: jnp.repeat(x, 500, axis=0) for name, x in make_batch().items()}
    network = Recorder()
    objective = diffusion.FlowMatching(label_dropout=0.3, conditional=True)
    objective(network, batch, jax.random.key(0))
    hidden = np.asarray(network.label) == diffusion.NO_LABEL
    assert hidden.mean() == pytest.approx(0.3, abs=0.03)
    np.testing.assert_array_equal(np.asarray(network.label)[~hidden], np.asarray(batch["label"])[~hidden])
    objective(network, batch, None)
    np.testing.assert_array_equal(network.label, batch["label"])


def test_noise_dropout_and_times_have_keys_of_their_own():
    network, other = Recorder(), Recorder()
    objective = diffusion.FlowMatching()
    objective(network, make_batch(), jax.random.key(0))
    objective(other, make_batch(), jax.random.key(1))
    keys = [jax.random.key_data(k).tolist() for k in (network.key, other.key, jax.random.key(0))]
    assert keys[0] != keys[1]
    assert keys[0] != keys[2]
    assert not np.allclose(network.time, other.time)


def test_the_higher_rank_is_the_better():
    assert diffusion.DDPM().rank({"loss": 0.1}) > diffusion.DDPM().rank({"loss": 0.2})
    assert Classify().rank({"loss": 9.0, "accuracy": 0.8}) > Classify().rank({"loss": 0.1, "accuracy": 0.7})


def init(key):
    return {"scale": jnp.zeros(()), "shift": jnp.zeros(())}


def apply(params, inputs, keep, key=None, *, time, label):
    """An affine network, and a loss that a layer adds."""
    t = time[:, None, None, None]
    return params["scale"] * inputs + params["shift"] * t, jnp.square(params["shift"] - 1)


def train(objective, accumulate=1, steps=2):
    common = {"name": "sgd", "lr": 0.1, "schedule": {"name": "constant"}, "clip": None, "ema": None}
    optimizer = optim.build({**common, "accumulate": accumulate}, 100)
    state = step.init_state(0, init=init, optimizer=optimizer, latch=True)
    update = jax.jit(functools.partial(step.train_step, apply=apply, optimizer=optimizer, objective=objective))
    rows = []
    for _ in range(steps):
        state, values = update(state, make_batch())
        rows.append(dict(zip(step.metrics_of(objective), np.asarray(values).tolist(), strict=True)))
    return state, rows


def test_train_step_has_the_objective_s_metrics_and_the_layers_losses():
    _, rows = train(diffusion.FlowMatching())
    assert list(rows[0]) == ["loss", "grad_norm", "learning_rate", "ok"]
    assert rows[0]["ok"] == 1
    state, _ = train(diffusion.FlowMatching(), steps=40)
    assert float(state["params"]["shift"]) > 0.3  # pulled to 1 by the added loss; the flow alone leaves it near 0


def test_microbatches_draw_their_own_noise_and_the_step_repeats():
    objective = diffusion.FlowMatching()
    (_, one), (_, again), (_, split) = train(objective), train(objective), train(objective, accumulate=2)
    assert one == again
    assert split[0]["loss"] != one[0]["loss"]
    assert split == train(objective, accumulate=2)[1]
    assert one[0]["loss"] != one[1]["loss"]
