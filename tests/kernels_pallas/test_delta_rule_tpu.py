"""The TPU kernels of the delta rule by interpretation, against the reference one token at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import mosaic_tpu
from kernels_pallas.delta_rule import delta_rule, pallas_tpu_chunk, tiles
from kernels_pallas.delta_rule.pallas_tpu import delta_rule_tpu
from kernels_pallas.delta_rule.ref import delta_rule_ref
from tests.kernels_pallas.test_delta_rule import make_inputs
from tests.numerics import rel_rms

ORDER = ("q", "k", "v", "beta", "log_decay", "state")
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


@functools.partial(jax.jit, static_argnums=0)
def forward_and_grads(function, arrays):
    def loss(arrays):
        y, state = function(*(arrays.get(name) for name in ORDER))
        weights = (jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for x in (y, state))
        return sum((x * w).sum() for x, w in zip((y, state), weights)), {"y": y, "state": state}

    (_, outputs), grads = jax.value_and_grad(loss, has_aux=True)(arrays)
    return outputs | {"d" + name: value for name, value in grads.items()}


@functools.cache
def kernels(**options):
    return functools.partial(delta_rule_tpu, **options)


def check(arrays, **options):
    """Outputs and all gradients against the reference, which is given the same rounded inputs in float32."""
    dtype = str(arrays["q"].dtype)
    got = forward_and_grads(kernels(interpret=True, **options), arrays)
    want = forward_and_grads(delta_rule_ref, {name: x.astype(jnp.float32) for name, x in arrays.items()})
    assert got["y"].dtype == arrays["v"].dtype
    for name in want:
        assert rel_rms(got[name], want[name]) < TOLERANCE[dtype], name


@pytest.mark.parametrize("decay", [None, 0.1, 30.0])  # none, weak, and products over a chunk below 1e-30
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matches_ref(dtype, decay):
    """Sizes that all differ, a length that does not divide, two chunks of two heads a step."""
    check(make_inputs(2, 101, 2, 5, 7, decay=decay, dtype=dtype), chunk=16, units=4)


@pytest.mark.parametrize(
    ("shape", "decay", "dtype"),
    [
        ((2, 1, 3, 5, 4), 0.1, "float32"),
        ((1, 20, 2, 6, 3), None, "float32"),
        ((1, 20, 2, 64, 64), 0.1, "bfloat16"),  # two heads fill the lanes
    ],
)
def test_short(shape, decay, dtype):
    check(make_inputs(*shape, decay=decay, dtype=dtype, seed=shape[1]))


@pytest.mark.slow
def test_passes_group_heads_differently():
    """Nine heads of a chunk forward, three heads of two chunks backward."""
    arrays = make_inputs(1, 60, 9, 5, 4, decay=0.1, dtype="bfloat16")
    forward, backward = tiles.plan(60, 9, 5, 4, jnp.dtype("bfloat16"), True, True, 16)
    assert (forward.heads, forward.per_step, backward.heads, backward.per_step) == (9, 1, 3, 2)
    check(arrays, chunk=16)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [None, 0.1, 30.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [64, 101, 512, 1000])
def test_lengths(length, dtype, decay):
    """With the chunks that a TPU would get; two a step, which compile sooner than eight."""
    check(make_inputs(1, length, 2, 24, 40, decay=decay, dtype=dtype, seed=length), units=4)


@pytest.mark.parametrize(("dtype", "alike"), [("float32", 3.0), ("bfloat16", 1.0)])
def test_keys_that_resemble_each_other(dtype, alike):
    """Mean cosine 0.9 (0.5) and beta up to 2, nearly reflections, where a series of powers would cancel."""
    check(make_inputs(1, 128, 2, 16, 8, largest=2.0, alike=alike, dtype=dtype, decay=0.01), chunk=64, units=2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [16, 128])
def test_inverse(size, dtype):
    """All keys alike and beta = 2: the powers of the matrix pass 2^size, its inverse has entries of at most 2."""
    a = np.tril(np.full((size, size), 2.0), -1)
    (found,) = jax.jit(functools.partial(pallas_tpu_chunk.inverses, dtype=dtype))([jnp.asarray(a, jnp.float32)])
    assert found.dtype == dtype
    assert rel_rms(found.astype(jnp.float32), np.linalg.inv(np.eye(size) + a)) < TOLERANCE[str(found.dtype)]


def test_sums_of_decays_do_not_cancel():
    """A weak decay after a strong one is as exact as alone; what a chunk forgot at once is 0."""
    rows = np.random.default_rng(0).uniform(-1e-3, 0, (2, 128))
    rows[:, 40], rows[1, 90] = -1e4, -50.0
    since_start, to_end, pairs = jax.jit(pallas_tpu_chunk.decays, static_argnums=1)(jnp.asarray(rows, jnp.float32), 3)
    within = np.cumsum(rows[:, 41:90], 1)
    for h in range(2):
        assert rel_rms(np.log(pairs[h][41:90, 40]), within[h]) < 1e-4  # log of a float32 just below 1
        assert rel_rms(pairs[h][41:90, 40], np.exp(within[h])) < 1e-6
        assert not np.any(pairs[h][40:, :40])
        np.testing.assert_array_equal(pairs[h], np.tril(pairs[h]))
        np.testing.assert_array_equal(np.diagonal(pairs[h]), 1.0)
    assert rel_rms(to_end[:, 45], np.exp(rows[:, 46:].sum(1))) < 1e-6
    assert rel_rms(since_start[:, 39], np.exp(rows[:, :40].sum(1))) < 1e-6


def test_forgets_exactly():
    """-inf forgets everything before, and what follows is as in a fresh sequence."""
    arrays = make_inputs(2, 101, 2, 5, 7, decay=0.1)
    reset = arrays | {"log_decay": arrays["log_decay"].at[:, jnp.array([20, 37])].set(-jnp.inf)}
    check(reset, chunk=16, units=4)
    run = functools.partial(forward_and_grads, kernels(interpret=True, chunk=16, units=4))
    other = reset | {name: reset[name].at[:, :37].add(1.0) for name in ("k", "v")}
    np.testing.assert_array_equal(run(other)["y"][:, 37:], run(reset)["y"][:, 37:])


def test_padding_writes_nothing():
    """beta = 0 and k = 0, in front, between, behind and through a whole row."""
    arrays = make_inputs(2, 101, 2, 5, 7, decay=0.1)
    keep = np.random.default_rng(1).random(101) < 0.6
    for name in ("beta", "k"):
        arrays[name] = arrays[name].at[0, ~keep].set(0.0).at[1].set(0.0)
    check(arrays, chunk=16, units=4)


def test_public_function():
    """By name, in a context, under vmap, checkpoint and a scan; without the context it is refused on a CPU."""
    arrays = make_inputs(2, 20, 1, 5, 4, decay=0.1)

    def loss(arrays):
        def each(arrays):
            y, state = delta_rule(**jax.tree.map(lambda x: x[None], arrays), implementation="pallas_tpu")
            return (y**2).sum() + (state**3).sum()

        return jax.lax.scan(lambda c, _: (c + jax.vmap(jax.checkpoint(each))(arrays).sum(), None), 0.0, length=2)[0]

    def expected(arrays):
        y, state = delta_rule_ref(**arrays)
        return 2 * ((y**2).sum() + (state**3).sum())

    with mosaic_tpu.interpret():
        got, grads = jax.jit(jax.value_and_grad(loss))(arrays)
    want, wanted = jax.jit(jax.value_and_grad(expected))(arrays)
    assert rel_rms(got, want) < 1e-5
    for name in wanted:
        assert rel_rms(grads[name], wanted[name]) < 1e-5, name
    with pytest.raises(NotImplementedError, match="lowered for cpu"):
        delta_rule(**arrays, implementation="pallas_tpu")


def test_no_races(capsys):
    """The simulated memories: reads of unwritten ones give NaN, and two cores may work on rows and heads."""
    mode = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    arrays = make_inputs(1, 32, 2, 5, 4, decay=0.1)
    got = forward_and_grads(functools.partial(delta_rule_tpu, chunk=16, units=1, interpret=mode), arrays)
    want = forward_and_grads(delta_rule_ref, arrays)
    for name in want:
        assert rel_rms(got[name], want[name]) < 1e-5, name
    assert "RACE" not in capsys.readouterr().out  # the detector itself only prints


def test_residuals():
    """Kept between the passes: the inputs and one state a chunk in their dtype, less than v again at K = 64."""
    arrays = make_inputs(1, 1024, 2, 64, 64, decay=0.1, dtype="bfloat16")

    def kept(arrays):
        return jax.vjp(lambda *args: delta_rule_tpu(*args, interpret=True), *(arrays[name] for name in ORDER))[1]

    saved = jax.tree.leaves(jax.eval_shape(kept, arrays))
    of_inputs = sum(x.size * x.dtype.itemsize for x in arrays.values())
    states = 1024 // 128 * 2 * 64 * 64 * 2
    assert sum(x.size * x.dtype.itemsize for x in saved) < 1.05 * of_inputs + states


@pytest.mark.parametrize(
    ("shape", "dtype", "match"),
    [((1, 8, 1, 4, 4), "float16", "float16"), ((1, 4096, 1, 2048, 2048), "float32", "MiB of VMEM")],
)
def test_refusals(shape, dtype, match):
    given = jax.eval_shape(lambda: make_shapes(shape, dtype))
    with pytest.raises(NotImplementedError, match=match):
        jax.eval_shape(lambda args: jax.grad(lambda q: delta_rule_tpu(q, *args[1:])[0].sum())(args[0]), given)


def make_shapes(shape, dtype):
    batch, length, heads, width, deep = shape
    rows = jnp.zeros((batch, length, heads, width), dtype)
    gate = jnp.zeros((batch, length, heads), dtype)
    values = jnp.zeros((batch, length, heads, deep), dtype)
    return rows, rows, values, gate, gate, jnp.zeros((batch, heads, width, deep), jnp.float32)
