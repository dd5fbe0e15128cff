"""One update and one evaluation batch, as pure functions of arrays.

    state  {"step", "batch": int32, "rng": key data, "params", "opt", "ema" (if averaged), "halted" (unless skipping)}
           step counts updates; batch is the next one's place in the data order, the same unless a run was rolled back
    batch  {"inputs": int32[B T] or [B 2 T], "keep": bool, "label": int32[B] or [B T], "weight": float32[B]};
           images are "inputs": float32[B H W C] without "keep"

What is learnt is the objective's affair (experiments/objectives.py): it turns a batch and the network into sums.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from arch.layers import cast
from experiments import optim
from experiments.objectives import Batch, Classify, Objective, Sums
from experiments.objectives import score as score

State = dict[str, Any]
Apply = Callable[..., Any]  # (params, inputs, keep, key=None) -> logits; in training (logits, losses of the layers)


def metrics_of(objective: Objective) -> tuple[str, ...]:
    """The vector that a train step returns."""
    return (*objective.metrics, "grad_norm", "learning_rate", "ok")


METRICS = metrics_of(Classify())
SUMS = ("loss", "correct", "weight")  # the vector of an evaluation step of a classifier


def init_state(
    seed: jax.Array,
    *,
    init: Callable[[jax.Array], Any],
    optimizer: optim.Optimizer,
    latch: bool,
    prng: str = "threefry2x32",
) -> State:
    """The state before the first step.

    latch: the state can halt at a non-finite value. prng: the generator of dropout; parameters always take threefry.
    """
    key = jax.random.key(seed)
    params = init(jax.random.fold_in(key, 0))
    state = {
        "step": jnp.zeros((), jnp.int32),
        "batch": jnp.zeros((), jnp.int32),
        "rng": jax.random.key_data(jax.random.key(jax.random.bits(jax.random.fold_in(key, 1)), impl=prng)),
        "params": params,
        "opt": optimizer.direction.init(params),
    }
    if optimizer.ema is not None:
        state["ema"] = jax.tree.map(jnp.copy, params)
    if latch:
        state["halted"] = jnp.zeros((), bool)
    return state


def train_step(
    state: State,
    batch: Batch,
    *,
    apply: Apply,
    optimizer: optim.Optimizer,
    dtype: Any = jnp.float32,
    objective: Objective | None = None,
    smoothing: float = 0.0,
    prng: str = "threefry2x32",
) -> tuple[State, jax.Array]:
    """One update. Pure: no I/O, no clock, no globals. Returns the new state and metrics_of(objective), float32.

    objective None: classify, with label smoothing.

    A non-finite loss or gradient changes neither parameters nor optimiser. The step is then passed over, or, when the
    state has "halted", that is set and every later call returns the state as it is.
    """
    learns: Objective = objective or Classify(smoothing=smoothing)
    key = jax.random.wrap_key_data(state["rng"], impl=prng)
    key = jax.random.fold_in(key, state["step"])  # the step alone decides

    def loss_fn(params: Any, rows: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        low, added = cast(params, dtype), []

        def predict(*inputs: Any, **conditions: Any) -> jax.Array:
            output, more = apply(low, *inputs, **conditions)
            added.append(more)
            return output

        sums = learns(predict, rows, key)
        return sums[0] + sums[-1] * sum(added), sums

    gradient = jax.grad(loss_fn, has_aux=True)
    grads, sums = _accumulated(gradient, state["params"], batch, key, optimizer.accumulate, len(learns.metrics) + 1)
    loss, weight = sums[0], jnp.maximum(sums[-1], 1e-9)
    grads = jax.tree.map(lambda g: g / weight, grads)
    norm = optax.tree.norm(grads)
    if optimizer.clip is not None:
        grads, _ = optax.clip_by_global_norm(optimizer.clip).update(grads, optax.EmptyState())
    direction, opt = optimizer.direction.update(grads, state["opt"], state["params"])
    learning_rate = jnp.asarray(optimizer.schedule(state["step"]), jnp.float32)
    new = {"params": optim.apply(state["params"], direction, learning_rate), "opt": opt}
    if optimizer.ema is not None:
        new["ema"] = optim.average(state["ema"], new["params"], optimizer.ema, state["step"])

    ok = jnp.isfinite(loss) & jnp.isfinite(norm)
    moves = jnp.ones((), jnp.int32)
    if "halted" in state:
        ok &= ~state["halted"]
        new["halted"], moves = ~ok, ok.astype(jnp.int32)
    for name in ("params", "opt", "ema"):
        if name in new:
            new[name] = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new[name], state[name])
    new = {**state, **new, "step": state["step"] + moves, "batch": state["batch"] + moves}
    means = [total / weight for total in sums[:-1]]
    return new, jnp.stack([*means, norm, learning_rate, ok.astype(jnp.float32)])


def _accumulated(
    gradient: Callable[..., Any], params: Any, batch: Batch, key: jax.Array, parts: int, count: int
) -> tuple[Any, Sums]:
    """Gradient and `count` sums over the batch, one microbatch at a time.

    Microbatch i holds rows i, i + parts, ...: each device's rows are split, so that none moves to another device.
    """
    if parts == 1:
        return gradient(params, batch, key)
    micro = jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), dict(batch))

    def add(total: Any, part: Any) -> tuple[Any, None]:
        rows, i = part
        return jax.tree.map(jnp.add, total, gradient(params, rows, jax.random.fold_in(key, i))), None

    zero = jax.tree.map(jnp.zeros_like, params), (jnp.zeros(()),) * count
    return jax.lax.scan(add, zero, (micro, jnp.arange(parts)))[0]


def eval_step(
    params: Any, batch: Batch, *, apply: Apply, dtype: Any = jnp.float32, objective: Objective | None = None
) -> jax.Array:
    """The objective's sums over one batch, deterministic and without label smoothing. objective None: classify."""
    low = cast(params, dtype)
    return jnp.stack((objective or Classify())(lambda *inputs, **also: apply(low, *inputs, **also), batch, None))
