"""From noise to samples: the ordinary differential equation of a flow, and the reverse steps of a diffusion.

Pure functions. What they ask of the network is a closure over x and a vector of times, so that they can be tried on
models that are known in closed form. Each is one lax.scan over its steps.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

Network = Callable[[Float[Array, "B *S"], Float[Array, " B"]], Float[Array, "B *S"]]
Bounds = tuple[Any, Any] | None  # least and greatest value of clean data, by channel


def row_keys(key: Key[Array, ""], indices: Any) -> Key[Array, " B"]:
    """A key an example: its random numbers then depend neither on the batch it is in nor on its place there."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(indices))


def row_normal(keys: Key[Array, " B"], shape: tuple[int, ...]) -> Float[Array, "B *S"]:
    """N(0, 1), of shape `shape` for each key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def integrate(
    velocity: Network, x: Float[Array, "B *S"], *, steps: int, method: Literal["euler", "heun"] = "heun"
) -> Float[Array, "B *S"]:
    """x(0) of dx/dt = velocity(x, t) with x(1) = x, in equal steps.

    Euler asks the network once a step, Heun's method (the explicit trapezoidal rule) twice; their errors fall with the
    first and the second power of the step. Heun for diffusion: Karras et al. 2022, arXiv:2206.00364.
    """

    def step(x: Array, ends: tuple[Array, Array]) -> tuple[Array, None]:
        here, there = (jnp.broadcast_to(t, x.shape[:1]) for t in ends)
        h = ends[1] - ends[0]
        v = velocity(x, here)
        y = x + h * v
        if method == "heun":
            y = x + h / 2 * (v + velocity(y, there))
        return y, None

    times = jnp.linspace(1.0, 0.0, steps + 1)
    return jax.lax.scan(step, x, (times[:-1], times[1:]))[0]


def timesteps(total: int, steps: int) -> np.ndarray:
    """`steps` of the timesteps 0 .. total - 1, evenly spread from the last to the first."""
    return np.round(np.linspace(total - 1, 0, steps)).astype(np.int32)


def reverse(
    clean: Network,
    x: Float[Array, "B *S"],
    alpha_bar: Float[Array, " N"],
    keys: Key[Array, " B"],
    *,
    steps: int,
    eta: float = 0.0,
    bounds: Bounds = None,
) -> Float[Array, "B *S"]:
    """Samples of a diffusion x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps, a = alpha_bar, from x = x_{N-1}.

    With x_0 = clean(x_t, (t + 1) / N), clipped to the bounds, and eps = (x_t - sqrt(a_t) x_0) / sqrt(1 - a_t), a step
    from t to s < t is

        x_s = sqrt(a_s) x_0 + sqrt(1 - a_s - sigma^2) eps + sigma z,
        sigma^2 = eta^2 (1 - a_s) / (1 - a_t) (1 - a_t / a_s),

    and the last gives x_0. eta 0 is DDIM (Song et al. 2020, arXiv:2010.02502), which draws nothing. eta 1 is ancestral
    sampling from the posterior q(x_s | x_t, x_0), the smaller of the two variances of Ho et al. 2020, arXiv:2006.11239;
    with steps < N it takes the diffusion over the chosen timesteps alone (Nichol and Dhariwal 2021, arXiv:2102.09672).
    """
    chosen = timesteps(len(alpha_bar), steps)
    here = alpha_bar[chosen]
    there = jnp.append(alpha_bar[chosen[1:]], 1.0)

    def step(x: Array, at: tuple[Array, ...]) -> tuple[Array, None]:
        i, t, a, b = at
        x0 = clean(x, jnp.broadcast_to((t + 1) / len(alpha_bar), x.shape[:1]))
        if bounds is not None:
            x0 = jnp.clip(x0, *bounds)
        eps = (x - jnp.sqrt(a) * x0) / jnp.sqrt(1 - a)
        variance = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
        y = jnp.sqrt(b) * x0 + jnp.sqrt(jnp.maximum(1 - b - variance, 0.0)) * eps
        if eta:
            z = row_normal(jax.vmap(lambda key: jax.random.fold_in(key, i))(keys), x.shape[1:])
            y = y + jnp.sqrt(variance) * z
        return y, None

    return jax.lax.scan(step, x, (jnp.arange(steps), jnp.asarray(chosen), here, there))[0]
