"""Samplers against a model that is known in closed form: data N(mu, s^2), whose best network is an affine map."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import diffusion, samplers

MU, S = 1.5, 0.6
SHAPE = (4000, 3)


def noise(shape=SHAPE, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def velocity(x, time):
    """E[eps - x_0 | x_t] of the flow x_t = (1 - t) x_0 + t eps."""
    t = time[:, None]
    surprise = (x - (1 - t) * MU) / ((1 - t) ** 2 * S**2 + t**2)
    return t * surprise - (MU + (1 - t) * S**2 * surprise)


def network_of(objective):
    """What minimises the loss of a DDPM objective: E[eps | x_t], or E[v | x_t]."""
    levels = diffusion.alpha_bars(objective.schedule, objective.timesteps)

    def ask(x, time):
        a = levels[jnp.round(time * objective.timesteps).astype(int) - 1][:, None]
        surprise = (x - jnp.sqrt(a) * MU) / (a * S**2 + 1 - a)
        eps, x0 = jnp.sqrt(1 - a) * surprise, MU + jnp.sqrt(a) * S**2 * surprise
        return eps if objective.predict == "noise" else jnp.sqrt(a) * eps - jnp.sqrt(1 - a) * x0

    return ask


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_flow_ends_where_the_closed_form_does(method, order):
    """The flow of Gaussian data takes z to mu + s z; the error falls with the method's power of the step."""
    errors = []
    for steps in (16, 32, 64):
        found = samplers.integrate(velocity, noise((8, 3)), steps=steps, method=method)
        errors.append(float(jnp.abs(found - (MU + S * noise((8, 3)))).max()))
    assert errors[-1] < (0.05 if order == 1 else 2e-3)
    for coarse, fine in itertools.pairwise(errors):
        assert np.log2(coarse / fine) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("predict", ["noise", "velocity"])
def test_ddim_ends_where_the_closed_form_does(predict):
    """Its limit is the same affine map, from the level where it starts; it falls with the first power of the step."""
    objective = diffusion.DDPM(predict=predict, schedule="linear", timesteps=1000)
    a = diffusion.alpha_bars("linear", 1000)[-1]
    z = noise((8, 3))
    exact = MU + S * (z - jnp.sqrt(a) * MU) / jnp.sqrt(a * S**2 + 1 - a)
    errors = []
    for steps in (50, 100, 200):
        keys = samplers.row_keys(jax.random.key(1), np.arange(8))
        found = objective.sample(network_of(objective), z, keys, sampler="ddim", steps=steps)
        errors.append(float(jnp.abs(found - exact).max()))
    assert errors[-1] < 0.02
    assert errors[0] / errors[2] == pytest.approx(4, rel=0.3)


@pytest.mark.parametrize(("predict", "schedule"), [("noise", "linear"), ("velocity", "cosine")])
@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 200), ("ancestral", 1000)])
def test_ddpm_samples_have_the_data_s_mean_and_spread(predict, schedule, sampler, steps):
    objective = diffusion.DDPM(predict=predict, schedule=schedule, timesteps=1000)
    keys = samplers.row_keys(jax.random.key(1), np.arange(SHAPE[0]))
    sample = jax.jit(lambda z: objective.sample(network_of(objective), z, keys, sampler=sampler, steps=steps))
    found = np.asarray(sample(noise()))
    assert found.mean() == pytest.approx(MU, abs=0.03)
    assert found.std() == pytest.approx(S, abs=0.03)


def test_ancestral_step_is_the_posterior():
    """One step from t to s against q(x_s | x_t, x_0) of Ho et al., equations 6 and 7, by its own formula."""
    levels = jnp.asarray([0.9, 0.5, 0.2])
    x, x0 = noise((50_000, 1)), 0.3
    keys = samplers.row_keys(jax.random.key(2), np.arange(50_000))
    seen = []

    def clean(x, time):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x, ordered=True)
        return jnp.full_like(x, x0)

    found = samplers.reverse(clean, x, levels, keys, steps=3, eta=1.0)
    jax.effects_barrier()
    np.testing.assert_allclose(found, x0, rtol=1e-6)
    for before, after, (a, b) in zip(seen, seen[1:], ((0.2, 0.5), (0.5, 0.9))):
        alpha = a / b
        mean = np.sqrt(b) * (1 - alpha) / (1 - a) * x0 + np.sqrt(alpha) * (1 - b) / (1 - a) * before
        assert np.std(after - mean) == pytest.approx(np.sqrt((1 - b) / (1 - a) * (1 - alpha)), rel=0.02)
        assert abs(np.mean(after - mean)) < 0.01
        assert abs(np.corrcoef(before[:, 0], (after - mean)[:, 0])[0, 1]) < 0.02


def test_timesteps_run_from_the_last_to_the_first():
    assert samplers.timesteps(10, 10).tolist() == list(range(9, -1, -1))
    assert samplers.timesteps(1000, 3).tolist() == [999, 500, 0]
    assert samplers.timesteps(1000, 1).tolist() == [999]


def test_guesses_are_clipped():
    objective = diffusion.DDPM(timesteps=50)
    keys = samplers.row_keys(jax.random.key(1), np.arange(8))
    bounds = (jnp.full(3, MU - 0.1), jnp.full(3, MU + 0.1))
    for sampler in objective.samplers:
        found = objective.sample(network_of(objective), noise((8, 3)), keys, sampler=sampler, steps=20, bounds=bounds)
        assert float(jnp.abs(found - MU).max()) <= 0.1 + 1e-6


def test_a_row_s_numbers_are_its_own():
    """Ancestral samples of rows 3 and 5 are the same whichever rows are drawn beside them."""
    objective = diffusion.DDPM(timesteps=30)

    def drawn(indices):
        keys = samplers.row_keys(jax.random.key(1), indices)
        z = samplers.row_normal(keys, (3,))
        return objective.sample(network_of(objective), z, keys, sampler="ancestral", steps=10)

    np.testing.assert_allclose(drawn(np.arange(8))[jnp.asarray([3, 5])], drawn(np.asarray([3, 5])), rtol=1e-6)


def test_guidance_moves_away_from_no_label():
    def network(x, time, label):
        return x * 0 + jnp.where(label < 0, 1.0, 3.0)[:, None]

    x, label = noise((4, 2)), jnp.asarray([0, 1, 2, 0])
    for scale, value in ((1.0, 3.0), (0.0, 1.0), (2.5, 6.0)):
        np.testing.assert_allclose(diffusion.guided(network, label, scale)(x, jnp.ones(4)), value)
