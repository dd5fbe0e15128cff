"""Optimisers and learning-rate schedules: optax transformations behind the registries.

An optimiser here is a direction d_t; the step is p <- p - lr(t) (d_t + decay). The learning rate is a function of the
run's step alone, not of a counter inside the optimiser, so a skipped update does not shift the schedule, and
`learning_rate` in the metrics is the rate that was used. t counts updates already made: the first update uses lr(0).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax

from arch.errors import ConfigError, within
from arch.registry import OPTIMIZERS, SCHEDULES, Choice
from arch.schema import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Rate

Schedule = Callable[[Any], Any]  # step -> learning rate, float32


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The options that every optimiser has, used by the step."""

    lr: PositiveFloat  # peak learning rate; the schedule rsqrt has a meaning of its own for it
    schedule: Annotated[Mapping, Choice((SCHEDULES,))]
    clip: PositiveFloat | None = None  # largest global gradient norm
    accumulate: Positive = 1  # micro-batches a step; the batch is cut into so many
    ema: Rate | None = None  # decay of the averaged parameters; evaluation then uses them


@dataclass(frozen=True)
class Optimizer:
    """What the train step needs. direction's state lives in state["opt"]; nothing else here has any."""

    direction: optax.GradientTransformation
    schedule: Schedule
    clip: float | None
    accumulate: int
    ema: float | None


def build(config: Mapping[str, Any], steps: int) -> Optimizer:
    """The optimiser that a resolved `optimizer` section describes, for a run of `steps` updates."""
    shared = {field.name for field in fields(Shared)}
    own = {key: value for key, value in config.items() if key not in shared}
    with within("optimizer"):
        schedule = SCHEDULES.build(config["schedule"], path="schedule", lr=config["lr"], steps=steps)
        direction = OPTIMIZERS.build(own)
    return Optimizer(direction, schedule, config["clip"], config["accumulate"], config["ema"])


def apply(params: Any, direction: Any, learning_rate: jax.Array) -> Any:
    """p - lr d for every parameter."""
    return jax.tree.map(lambda p, d: p - learning_rate * d, params, direction)


def average(mean: Any, params: Any, decay: float, step: jax.Array) -> Any:
    """mean <- d mean + (1 - d) p, d = min(decay, (1 + t) / (10 + t)), so that the initial values are soon forgotten."""
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda m, p: d * m + (1 - d) * p, mean, params)


def matrices(params: Any) -> Any:
    """True for arrays of two or more axes: kernels and embeddings, not biases, norms or scales."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def _decay(weight_decay: float, decay: str) -> list[optax.GradientTransformation]:
    if not weight_decay:
        return []
    return [optax.add_decayed_weights(weight_decay, mask=matrices if decay == "matrices" else None)]


@OPTIMIZERS.register("adam")
def adam(*, b1: Rate = 0.9, b2: Rate = 0.999, eps: PositiveFloat = 1e-8) -> optax.GradientTransformation:
    """Adam. Source: Kingma & Ba 2015, arXiv:1412.6980. No weight decay: that is adamw."""
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)


@OPTIMIZERS.register("adamw")
def adamw(
    *,
    b1: Rate = 0.9,
    b2: Rate = 0.98,
    eps: PositiveFloat = 1e-9,
    weight_decay: NonNegativeFloat = 0.0,
    decay: Literal["all", "matrices"] = "all",
) -> optax.GradientTransformation:
    """Adam with decoupled decay: p <- p - lr (m^ / (sqrt(v^) + eps) + weight_decay p).

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101. The defaults are those of Long Range Arena, whose Adam
    (flax.optim.Adam) has this form and decays every parameter, biases and norms too; decay="matrices" spares arrays of
    fewer than two axes.
    """
    return optax.chain(optax.scale_by_adam(b1=b1, b2=b2, eps=eps), *_decay(weight_decay, decay))


@OPTIMIZERS.register("lion")
def lion(
    *,
    b1: Rate = 0.9,
    b2: Rate = 0.99,
    weight_decay: NonNegativeFloat = 0.0,
    decay: Literal["all", "matrices"] = "all",
) -> optax.GradientTransformation:
    """Lion: the sign of an interpolated momentum, decoupled decay. Source: Chen et al. 2023, arXiv:2302.06675."""
    return optax.chain(optax.scale_by_lion(b1=b1, b2=b2), *_decay(weight_decay, decay))


@OPTIMIZERS.register("sgd")
def sgd(
    *,
    momentum: Rate = 0.0,
    nesterov: bool = False,
    weight_decay: NonNegativeFloat = 0.0,
    decay: Literal["all", "matrices"] = "all",
) -> optax.GradientTransformation:
    """Gradient descent: m <- momentum m + (g + weight_decay p), d = m. The decay is L2: it enters the momentum."""
    if nesterov and not momentum:
        raise ConfigError("nesterov", "needs momentum; set momentum=0.9 or nesterov=False")
    trace = [optax.trace(decay=momentum, nesterov=nesterov)] if momentum else []
    return optax.chain(optax.identity(), *_decay(weight_decay, decay), *trace)


def _warmed(schedule: Schedule, lr: float, warmup: int) -> Schedule:
    """lr t / w for the first w steps, then the schedule from its beginning. lr(0) is 0, as in Long Range Arena."""
    if not warmup:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), schedule], [warmup])


def _after_warmup(warmup: int, steps: int) -> int:
    if warmup >= steps:
        raise ConfigError("warmup", f"{warmup} leaves no step of {steps} to decay over; use less than train.steps")
    return steps - warmup


@SCHEDULES.register("constant")
def constant(*, lr: float, warmup: NonNegative = 0) -> Schedule:
    """lr min(1, t/w)."""
    return _warmed(optax.constant_schedule(lr), lr, warmup)


@SCHEDULES.register("cosine")
def cosine(*, lr: float, steps: int, warmup: NonNegative = 0, cycle: Positive | None = None) -> Schedule:
    """lr min(1, t/w) 0.5 (1 + cos(pi p)), p = (t - w) / (steps - w): from lr after warm-up to 0 at the end.

    cycle=n is Long Range Arena's form, p = ((t - w) / n mod 1): a restart every n steps.
    """
    if cycle is None:
        return _warmed(optax.cosine_decay_schedule(lr, _after_warmup(warmup, steps)), lr, warmup)
    once = optax.cosine_decay_schedule(lr, cycle)
    return _warmed(lambda step: once(step % cycle), lr, warmup)


@SCHEDULES.register("rsqrt")
def rsqrt(*, lr: float, warmup: NonNegative = 0) -> Schedule:
    """lr min(1, t/w) / sqrt(max(t, w, 1)): Long Range Arena's schedule for ListOps, text and retrieval.

    lr is the base, not the peak: the peak is lr / sqrt(w), reached at t = w (0.05 and w = 1000 peak at 1.58e-3). A
    warm-up longer than the run never peaks; the LRA release does that in retrieval, so it is allowed.
    """
    warm = optax.linear_schedule(0.0, lr, warmup) if warmup else optax.constant_schedule(lr)
    return lambda step: warm(step) / jnp.sqrt(jnp.maximum(step, max(warmup, 1)) * 1.0)


@SCHEDULES.register("linear")
def linear(*, lr: float, steps: int, warmup: NonNegative = 0) -> Schedule:
    """lr min(1, t/w) (steps - t) / (steps - w), from lr after warm-up to 0 at the end."""
    return _warmed(optax.linear_schedule(lr, 0.0, _after_warmup(warmup, steps)), lr, warmup)
