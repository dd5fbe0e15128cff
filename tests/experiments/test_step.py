"""The pure step: loss, accumulation, precision, averaging, and what a non-finite value may touch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import optim, step

B, T, C, V = 8, 6, 3, 11
COMMON = {"lr": 0.1, "schedule": {"name": "constant"}, "clip": None, "accumulate": 1, "ema": None}


def make_batch(seed=0, weight=None):
    rng = np.random.default_rng(seed)
    inputs = rng.integers(1, V, (B, T)).astype(np.int32)
    inputs[:, 4:] *= rng.integers(0, 2, (B, 2)).astype(np.int32)
    return {
        "inputs": jnp.asarray(inputs),
        "keep": jnp.asarray(inputs != 0),
        "label": jnp.asarray(rng.integers(0, C, B).astype(np.int32)),
        "weight": jnp.ones(B) if weight is None else jnp.asarray(weight, jnp.float32),
    }


def init(key):
    return {"embed": jax.random.normal(key, (V, 4)), "out": {"kernel": jax.random.normal(key, (4, C))}}


def apply(params, inputs, keep, key=None):
    x = jnp.where(keep[..., None], params["embed"][inputs], 0).sum(1)
    x = x if key is None else x * jax.random.bernoulli(key, 0.5, x.shape)
    return (x @ params["out"]["kernel"]).astype(jnp.float32)


def make(latch=True, apply=apply, dtype=jnp.float32, smoothing=0.0, **config):
    optimizer = optim.build({**COMMON, "name": "sgd", **config}, 100)
    state = step.init_state(0, init=init, optimizer=optimizer, latch=latch)

    def with_losses(*args):
        return apply(*args), jnp.zeros(())

    train = functools.partial(step.train_step, apply=with_losses, optimizer=optimizer, dtype=dtype, smoothing=smoothing)
    return state, jax.jit(train)


def without_dropout(params, inputs, keep, key=None):
    return apply(params, inputs, keep)


def close(a, b, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), a, b)


def metrics(values):
    return dict(zip(step.METRICS, np.asarray(values).tolist()))


def test_classifier_loss_and_weights():
    weight = [1, 1, 0, 1, 0.5, 1, 1, 0]
    batch, logits = make_batch(weight=weight), jax.random.normal(jax.random.key(1), (B, C))
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    right = logits.argmax(-1) == batch["label"]
    close(
        step.score(logits, batch), ((each * np.array(weight)).sum(), (right * np.array(weight)).sum(), 5.5), rtol=1e-6
    )


def test_label_smoothing():
    batch, logits = make_batch(), jax.random.normal(jax.random.key(1), (B, C))
    smooth = optax.smooth_labels(jax.nn.one_hot(batch["label"], C), 0.2)
    close(step.score(logits, batch, 0.2)[0], optax.softmax_cross_entropy(logits, smooth).sum(), rtol=1e-6)


def test_language_model_predicts_the_next_token():
    batch = make_batch()
    logits = 20.0 * jax.nn.one_hot(jnp.roll(batch["inputs"], -1, axis=1), V)  # knows each next token
    loss, correct, weight = step.score(logits, batch)
    assert weight == np.asarray(batch["keep"])[:, 1:].sum()
    assert correct == weight
    assert loss / weight < 1e-6
    assert step.score(jnp.roll(logits, 1, axis=1), batch)[1] < weight


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_labels_of_single_tokens_are_scored_where_they_stand(smoothing):
    """Against a plain loop; a token with the label -1, and a row without weight, count for nothing."""
    rng = np.random.default_rng(3)
    weight = np.array([1, 1, 0, 1, 0.5, 1, 1, 0])
    label = rng.integers(-1, V, (B, T)).astype(np.int32)
    label[3] = -1
    logits = rng.normal(size=(B, T, V)).astype(np.float32)
    batch = {**make_batch(weight=weight), "label": jnp.asarray(label)}
    loss = correct = total = 0.0
    for row in range(B):
        for t in range(T):
            y = label[row, t]
            if y >= 0:
                log_p = logits[row, t] - np.log(np.exp(logits[row, t].astype(float)).sum())
                loss += weight[row] * ((1 - smoothing) * -log_p[y] + smoothing * -log_p.mean())
                correct += weight[row] * (logits[row, t].argmax() == y)
                total += weight[row]
    close(step.score(jnp.asarray(logits), batch, smoothing), (loss, correct, total), rtol=1e-5)
    poisoned = jnp.where(jnp.asarray(label)[..., None] < 0, 1e9, jnp.asarray(logits))
    close(step.score(poisoned, batch, smoothing), (loss, correct, total), rtol=1e-5)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_the_big_batch(parts):
    batch = make_batch(weight=[1, 1, 0, 1, 0.5, 1, 1, 0])  # microbatches of unequal weight
    whole, one = make(apply=without_dropout, clip=0.5)
    split, many = make(apply=without_dropout, clip=0.5, accumulate=parts)
    for seed in range(3):
        whole, a = one(whole, {**make_batch(seed), "weight": batch["weight"]})
        split, b = many(split, {**make_batch(seed), "weight": batch["weight"]})
        close(a, b, rtol=1e-5)
    close(whole["params"], split["params"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
def test_gradient_is_that_of_the_mean_loss(parts):
    batch = make_batch(weight=[1, 1, 0, 1, 0.5, 1, 1, 0])
    state, train = make(apply=without_dropout, accumulate=parts)

    def mean_loss(params):
        each = optax.softmax_cross_entropy_with_integer_labels(
            apply(params, batch["inputs"], batch["keep"]), batch["label"]
        )
        return (each * batch["weight"]).sum() / batch["weight"].sum()

    loss, grads = jax.value_and_grad(mean_loss)(state["params"])
    new, values = train(state, batch)
    assert metrics(values)["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics(values)["grad_norm"] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)
    close(new["params"], jax.tree.map(lambda p, g: p - 0.1 * g, state["params"], grads), rtol=1e-5, atol=1e-6)


def test_microbatches_draw_their_own_dropout():
    seen = []

    def record(params, inputs, keep, key=None):
        jax.debug.callback(lambda k: seen.append(tuple(k.tolist())), jax.random.key_data(key))
        return apply(params, inputs, keep, key)

    state, train = make(apply=record, accumulate=4)
    state, _ = train(state, make_batch())
    jax.block_until_ready(train(state, make_batch()))
    jax.effects_barrier()
    assert len(set(seen)) == 8


def test_step_decides_the_random_numbers():
    state, train = make()
    _, a = train({**state, "step": jnp.int32(5)}, make_batch())
    _, b = train({**state, "step": jnp.int32(5)}, make_batch())
    _, c = train({**state, "step": jnp.int32(6)}, make_batch())
    assert metrics(a) == metrics(b) != metrics(c)


def test_clip_bounds_the_update_and_reports_the_whole_norm():
    state, train = make(apply=without_dropout, clip=1e-3)
    new, values = train(state, make_batch())
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, new["params"], state["params"]))
    assert float(moved) == pytest.approx(0.1 * 1e-3, rel=1e-2)
    assert metrics(values)["grad_norm"] > 0.1


def test_learning_rate_is_that_of_the_step():
    state, train = make(schedule={"name": "constant", "warmup": 10})
    state, values = train({**state, "step": jnp.int32(4)}, make_batch())
    assert metrics(values)["learning_rate"] == pytest.approx(0.04)
    assert int(state["step"]) == int(state["batch"]) + 4 == 5


def test_bf16_computes_in_bf16_and_keeps_float32():
    seen = []

    def record(params, inputs, keep, key=None):
        seen.extend(leaf.dtype for leaf in jax.tree.leaves(params))
        return apply(params, inputs, keep)

    state, train = make(apply=record, dtype=jnp.bfloat16)
    new, values = train(state, make_batch())
    assert set(seen) == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(new["params"])} == {jnp.dtype("float32")}
    exact = metrics(make(apply=without_dropout)[1](state, make_batch())[1])["loss"]
    assert metrics(values)["loss"] == pytest.approx(exact, rel=0.05)  # three significant digits of bf16
    assert metrics(values)["loss"] != exact


def test_average_follows_the_parameters():
    state, train = make(ema=0.5, apply=without_dropout)
    new, _ = train(state, make_batch())
    close(new["ema"], jax.tree.map(lambda m, p: 0.1 * m + 0.9 * p, state["params"], new["params"]), rtol=1e-5)


def poisoned(params, inputs, keep, key=None):
    """Not a number whenever the first token is 7."""
    return apply(params, inputs, keep) * jnp.where(inputs[0, 0] == 7, jnp.nan, 1.0)


def infinite_gradient(params, inputs, keep, key=None):
    """A finite loss whose gradient is not."""
    bad = jnp.where(inputs[0, 0] == 7, 0.0, 1.0)
    return apply(params, inputs, keep) + jnp.sqrt(params["embed"][0, 0] ** 2 * bad + 0.0)


def first_token(token):
    batch = make_batch()
    return {**batch, "inputs": batch["inputs"].at[0, 0].set(token)}


@pytest.mark.parametrize("fault", [poisoned, infinite_gradient])
@pytest.mark.parametrize("latch", [True, False])
def test_non_finite_never_reaches_the_state(fault, latch):
    state, train = make(latch, apply=fault, momentum=0.9, ema=0.9)
    state, values = train(state, first_token(1))
    assert metrics(values)["ok"] == 1
    bad, values = train(state, first_token(7))
    assert metrics(values)["ok"] == 0
    for name in ("params", "opt", "ema"):
        jax.tree.map(np.testing.assert_array_equal, bad[name], state[name])
    after, values = train(bad, first_token(1))
    if latch:  # halted: the very state that met the fault, for good
        assert metrics(values)["ok"] == 0
        assert int(after["step"]) == int(after["batch"]) == 1
        jax.tree.map(np.testing.assert_array_equal, after["params"], state["params"])
    else:  # passed over: the data and the schedule go on
        assert metrics(values)["ok"] == 1
        assert int(after["step"]) == 3
        assert not np.array_equal(after["params"]["embed"], state["params"]["embed"])


def test_evaluation_is_deterministic_and_not_smoothed():
    state, _ = make()
    batch = make_batch(weight=[1, 1, 0, 1, 1, 1, 1, 0])
    got = step.eval_step(state["params"], batch, apply=apply)
    close(got, jnp.stack(step.score(apply(state["params"], batch["inputs"], batch["keep"]), batch)), rtol=1e-6)
    assert got.shape == (len(step.SUMS),)
