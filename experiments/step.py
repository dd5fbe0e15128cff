"""One update and one evaluation batch, as pure functions of arrays.

    state  {"step", "batch": int32, "rng": key data, "params", "opt", "ema" (if averaged), "halted" (unless skipping)}
           step counts updates; batch is the next one's place in the data order, the same unless a run was rolled back
    batch  {"inputs": int32[B T] or [B 2 T], "keep": bool, "label": int32[B] or [B T], "weight": float32[B]};
           images are "inputs": float32[B H W C] without "keep"

A classifier's logits [B C] are scored against the label. A language model's [B T C] are scored token by token: against
the label of the same token where the task gives one a token (-1: not scored), else against the next token.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from arch.layers import cast
from experiments import optim

State = dict[str, Any]
Batch = Mapping[str, Any]
Apply = Callable[..., Any]  # (params, inputs, keep, key=None) -> logits; in training (logits, losses of the layers)

METRICS = ("loss", "accuracy", "grad_norm", "learning_rate", "ok")  # the vector a train step returns
SUMS = ("loss", "correct", "weight")  # the vector of an evaluation step


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


def score(logits: jax.Array, batch: Batch, smoothing: float = 0.0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over a batch of loss, correct answers and weight, in float32.

    Loss of one answer y: -(1 - s) log p_y - s mean_c log p_c, s the label smoothing.
    """
    target, weight = batch["label"], batch["weight"]
    if logits.ndim == 3 and target.ndim == 2:
        weight, target = weight[:, None] * (target >= 0), jnp.maximum(target, 0)
    elif logits.ndim == 3:
        logits, target = logits[:, :-1], batch["inputs"][:, 1:]
        weight = weight[:, None] * batch["keep"][:, 1:]
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    loss = -jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing * log_p.mean(axis=-1)
    correct = (logits.argmax(axis=-1) == target).astype(jnp.float32)
    return (loss * weight).sum(), (correct * weight).sum(), weight.sum()


def train_step(
    state: State,
    batch: Batch,
    *,
    apply: Apply,
    optimizer: optim.Optimizer,
    dtype: Any = jnp.float32,
    smoothing: float = 0.0,
    prng: str = "threefry2x32",
) -> tuple[State, jax.Array]:
    """One update. Pure: no I/O, no clock, no globals. Returns the new state and METRICS as one float32 vector.

    A non-finite loss or gradient changes neither parameters nor optimiser. The step is then passed over, or, when the
    state has "halted", that is set and every later call returns the state as it is.
    """
    key = jax.random.wrap_key_data(state["rng"], impl=prng)
    key = jax.random.fold_in(key, state["step"])  # the step alone decides

    def loss_fn(params: Any, rows: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        logits, more = apply(cast(params, dtype), rows["inputs"], rows.get("keep"), key)
        loss, correct, weight = score(logits, rows, smoothing)
        return loss + weight * more, (loss, correct, weight)

    gradient = jax.grad(loss_fn, has_aux=True)
    grads, sums = _accumulated(gradient, state["params"], batch, key, optimizer.accumulate)
    loss, correct, weight = sums
    weight = jnp.maximum(weight, 1e-9)
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
    return new, jnp.stack([loss / weight, correct / weight, norm, learning_rate, ok.astype(jnp.float32)])


def _accumulated(
    gradient: Callable[..., Any], params: Any, batch: Batch, key: jax.Array, parts: int
) -> tuple[Any, Any]:
    """Gradient and sums over the batch, one microbatch at a time.

    Microbatch i holds rows i, i + parts, ...: each device's rows are split, so that none moves to another device.
    """
    if parts == 1:
        return gradient(params, batch, key)
    micro = jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), dict(batch))

    def add(total: Any, part: Any) -> tuple[Any, None]:
        rows, i = part
        return jax.tree.map(jnp.add, total, gradient(params, rows, jax.random.fold_in(key, i))), None

    zero = jax.tree.map(jnp.zeros_like, params), (jnp.zeros(()),) * 3
    return jax.lax.scan(add, zero, (micro, jnp.arange(parts)))[0]


def eval_step(params: Any, batch: Batch, *, apply: Apply, dtype: Any = jnp.float32) -> jax.Array:
    """SUMS over one batch, deterministic and without label smoothing."""
    return jnp.stack(score(apply(cast(params, dtype), batch["inputs"], batch.get("keep")), batch))
