"""Diffusion objectives: a network learns to take noise away from data, and its samplers make data from noise.

    batch -> x_t, t -> network -> loss: the mean over pixels of a squared error, summed over the batch's weights

In training the time, the noise and the dropped labels of a row come from the step's key. In evaluation the noise comes
from the example's index, and the times of a split are a golden-ratio sequence in that index, which fills (0, 1) evenly:
the loss of a split is the same number for the same network, whatever the batch size, and compares between steps.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from arch.errors import ConfigError
from arch.registry import OBJECTIVES
from arch.schema import PositiveFloat, Range, Rate
from experiments.objectives import Batch, Predict, Sums
from experiments.samplers import Bounds, Network, integrate, reverse, row_keys, row_normal

EVALUATION = 0x5EED  # the seed of the noise that evaluation adds
NO_LABEL = -1
GOLDEN = 2654435769  # 2^32 / golden ratio, odd


def golden(index: Int[Array, " B"]) -> Float[Array, " B"]:
    """Points of (0, 1), any run of which is spread evenly: the fractional part of (index + 1) / golden ratio."""
    bits = ((index.astype(jnp.uint32) + 1) * jnp.uint32(GOLDEN)) >> 8
    return (bits.astype(jnp.float32) + 0.5) * 2.0**-24


class Diffusion:
    """What the objectives share. A subclass says how data is noised, what is predicted, and how that is undone."""

    output: ClassVar[Literal["logits", "image"]] = "image"
    metrics: ClassVar[tuple[str, ...]] = ("loss",)
    judged_by: ClassVar[str] = "loss"
    draws: ClassVar[bool] = True
    samplers: ClassVar[tuple[str, ...]]  # the first is the default

    def __init__(self, label_dropout: float, conditional: bool):
        self.label_dropout, self.conditional = label_dropout, conditional

    def __call__(self, predict: Predict, batch: Batch, key: Key[Array, ""] | None) -> Sums:
        x, weight = batch["inputs"].astype(jnp.float32), batch["weight"]
        label = batch["label"] if self.conditional else None
        if key is None:
            u = golden(batch["index"])
            noise = row_normal(row_keys(jax.random.key(EVALUATION), batch["index"]), x.shape[1:])
        else:
            key, *others = jax.random.split(key, 4)
            u = jax.random.uniform(others[0], x.shape[:1])
            noise = jax.random.normal(others[1], x.shape)
            if label is not None and self.label_dropout:
                dropped = jax.random.bernoulli(others[2], self.label_dropout, label.shape)
                label = jnp.where(dropped, NO_LABEL, label)
        noisy, target, time = self.pair(x, noise, u)
        found = predict(noisy, None, key, time=time, label=label)
        error = jnp.square(found.astype(jnp.float32) - target).mean(axis=tuple(range(1, x.ndim)))
        return (error * weight).sum(), weight.sum()

    def pair(self, x: Array, noise: Array, u: Float[Array, " B"]) -> tuple[Array, Array, Float[Array, " B"]]:
        """Noisy data, what the network is to say of it, and the time it is told; u is uniform in (0, 1)."""
        raise NotImplementedError

    def sample(
        self, network: Network, noise: Array, keys: Key[Array, " B"], *, sampler: str, steps: int, bounds: Bounds = None
    ) -> Array:
        """Data from noise; keys of the rows, for a sampler that draws more, bounds of clean data by channel."""
        raise NotImplementedError

    def rank(self, scores: Mapping[str, float]) -> float:
        return -scores["loss"] if math.isfinite(scores["loss"]) else -math.inf


def _over(values: Float[Array, " B"], x: Array) -> Array:
    """[B] as [B 1 1 1], to multiply x."""
    return values.reshape(values.shape + (1,) * (x.ndim - 1))


@OBJECTIVES.register("flow_matching")
class FlowMatching(Diffusion):
    """x_t = (1 - t) x_0 + t eps; the network predicts the velocity dx_t / dt = eps - x_0.

    Sources: Lipman et al. 2022, arXiv:2210.02747, with the optimal-transport path and sigma_min = 0; Liu et al. 2022,
    arXiv:2209.03003, without rectifying again. Both let t run from noise to data; here t = 1 is noise, as in the
    diffusions. times: how t is drawn; logit_normal is t = sigmoid(mean + std z), Esser et al. 2024, arXiv:2403.03206.
    """

    samplers = ("heun", "euler")

    def __init__(
        self,
        *,
        times: Literal["uniform", "logit_normal"] = "uniform",
        logit_mean: float = 0.0,
        logit_std: PositiveFloat = 1.0,
        label_dropout: Rate = 0.1,  # share of labels hidden in training, for guidance; conditional heads only
        conditional: bool = False,
    ):
        super().__init__(label_dropout, conditional)
        self.times, self.logit_mean, self.logit_std = times, logit_mean, logit_std

    def pair(self, x: Array, noise: Array, u: Float[Array, " B"]) -> tuple[Array, Array, Float[Array, " B"]]:
        if self.times == "logit_normal":
            u = jax.nn.sigmoid(self.logit_mean + self.logit_std * jax.scipy.special.ndtri(u))
        t = _over(u, x)
        return (1 - t) * x + t * noise, noise - x, u

    def sample(
        self, network: Network, noise: Array, keys: Key[Array, " B"], *, sampler: str, steps: int, bounds: Bounds = None
    ) -> Array:
        """Data from noise. The flow draws nothing and clips nothing on its way."""
        return integrate(network, noise, steps=steps, method=sampler)  # type: ignore[arg-type]


def alpha_bars(schedule: str, steps: int) -> Float[Array, " N"]:
    """The share of the data's variance left after each of `steps` steps: the product of 1 - beta up to it.

    linear: beta from 1e-4 to 0.02 at 1000 steps (Ho et al. 2020, arXiv:2006.11239), times 1000 / steps at others.
    cosine: a ratio of f(n) = cos^2(pi/2 (n / steps + s) / (1 + s)), s = 0.008 (Nichol and Dhariwal 2021,
    arXiv:2102.09672). beta is at most 0.999 in both.
    """
    n = jnp.arange(steps + 1, dtype=jnp.float32)
    if schedule == "linear":
        beta = 1000 / steps * (1e-4 + (0.02 - 1e-4) * n[:-1] / max(steps - 1, 1))
    else:
        f = jnp.cos(jnp.pi / 2 * (n / steps + 0.008) / 1.008) ** 2
        beta = 1 - f[1:] / f[:-1]
    return jnp.cumprod(1 - jnp.clip(beta, 0.0, 0.999))


@OBJECTIVES.register("ddpm")
class DDPM(Diffusion):
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps at timesteps 0 .. N - 1; the unweighted loss of Ho et al. (equation 14).

    predict: "noise" is eps; "velocity" is v = sqrt(a_t) eps - sqrt(1 - a_t) x_0 (Salimans and Ho 2022,
    arXiv:2202.00512). The network is told the time (t + 1) / N.
    """

    samplers = ("ddim", "ancestral")

    def __init__(
        self,
        *,
        timesteps: Annotated[int, Range(low=2)] = 1000,
        schedule: Literal["cosine", "linear"] = "cosine",
        predict: Literal["noise", "velocity"] = "noise",
        label_dropout: Rate = 0.1,
        conditional: bool = False,
    ):
        super().__init__(label_dropout, conditional)
        self.timesteps, self.schedule, self.predict = timesteps, schedule, predict

    def pair(self, x: Array, noise: Array, u: Float[Array, " B"]) -> tuple[Array, Array, Float[Array, " B"]]:
        t = jnp.minimum((u * self.timesteps).astype(jnp.int32), self.timesteps - 1)
        a = _over(alpha_bars(self.schedule, self.timesteps)[t], x)
        noisy = jnp.sqrt(a) * x + jnp.sqrt(1 - a) * noise
        target = noise if self.predict == "noise" else jnp.sqrt(a) * noise - jnp.sqrt(1 - a) * x
        return noisy, target, (t + 1) / self.timesteps

    def sample(
        self, network: Network, noise: Array, keys: Key[Array, " B"], *, sampler: str, steps: int, bounds: Bounds = None
    ) -> Array:
        """Data from noise. The clean data that a step guesses is clipped to the bounds."""
        if steps > self.timesteps:
            raise ConfigError("--steps", f"{steps} is more than the {self.timesteps} timesteps of the diffusion")
        levels = alpha_bars(self.schedule, self.timesteps)

        def clean(x: Array, time: Float[Array, " B"]) -> Array:
            a = _over(levels[jnp.round(time * self.timesteps).astype(jnp.int32) - 1], x)
            said = network(x, time)
            if self.predict == "noise":
                return (x - jnp.sqrt(1 - a) * said) / jnp.sqrt(a)
            return jnp.sqrt(a) * x - jnp.sqrt(1 - a) * said

        eta = {"ddim": 0.0, "ancestral": 1.0}[sampler]
        return reverse(clean, noise, levels, keys, steps=steps, eta=eta, bounds=bounds)


def guided(network: Any, label: Int[Array, " B"] | None, scale: float) -> Network:
    """The network as the samplers ask it. With a scale w other than 1: n(no label) + w (n(label) - n(no label)).

    Classifier-free guidance: Ho and Salimans 2022, arXiv:2207.12598; their w is this one less 1.
    """

    def ask(x: Array, time: Float[Array, " B"]) -> Array:
        if label is None or scale == 1:
            return network(x, time, label)
        both = network(
            jnp.concatenate([x, x]),
            jnp.concatenate([time, time]),
            jnp.concatenate([label, jnp.full_like(label, NO_LABEL)]),
        )
        given, free = jnp.split(both, 2)
        return free + scale * (given - free)

    return ask
