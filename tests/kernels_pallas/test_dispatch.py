import functools
import logging

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from kernels_pallas import dispatch, mosaic_tpu
from kernels_pallas.sharded import Axes


def fast(x):
    raise NotImplementedError("x is odd") if x % 2 else NotImplementedError("never")


def slow(x):
    if x > 9:
        raise NotImplementedError("x is large")
    return x + 1


TABLE = {"fast": fast, "slow": slow}


def test_named_runs_or_raises_its_own_reason():
    assert dispatch.call("op", TABLE, "slow", ("fast",), 1) == 2
    with pytest.raises(NotImplementedError, match="x is odd"):
        dispatch.call("op", TABLE, "fast", ("slow",), 1)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(KeyError, match="did you mean 'slow'"):
        dispatch.call("op", TABLE, "slwo", ("slow",), 1)


def test_automatic_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="archloom"):
        for _ in range(3):
            assert dispatch.call("op_of_this_test", TABLE, None, ("fast", "slow"), 1) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "op_of_this_test: chose 'slow' for cpu (fast: x is odd)"
    ]


def test_all_refusing_gives_every_reason():
    with pytest.raises(NotImplementedError, match="fast: x is odd; slow: x is large"):
        dispatch.call("op", TABLE, None, ("fast", "slow"), 11)


def _double(x_ref, o_ref):
    o_ref[...] = 2 * x_ref[...]


def _kernel(x):
    block = pl.BlockSpec(x.shape, lambda b: (0, 0))
    return mosaic_tpu.call(
        functools.partial(_double),
        name="double_forward",
        grid=(1,),
        in_specs=[block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        semantics=("arbitrary",),
        cost=pl.CostEstimate(flops=x.size, bytes_accessed=8 * x.size, transcendentals=0),
    )(x)


@jax.custom_vjp
def _doubled(x):
    return _kernel(x)


_doubled.defvjp(lambda x: (_kernel(x), (x,)), lambda saved, dy: (_kernel(dy) + 0 * saved[0],))

FORMS = {"chunked": lambda x, other: (jnp.sin(x),), "pallas_tpu": lambda x, other: (_doubled(x),)}
AUTO = {"tpu": ("pallas_tpu", "chunked"), "default": ("chunked",)}


def op(x, implementation=None):
    (y,) = dispatch.call("double", FORMS, implementation, AUTO, x, None, axes=Axes(("BH", None), ("BH",)))
    return y


def lowered(platform):
    gradient = jax.jit(jax.grad(lambda x: op(x).sum()))  # anew each time, as jit keeps what it traced
    return gradient.trace(jnp.ones((8, 128))).lower(lowering_platforms=(platform,)).as_text()


def test_unknown_platform_is_settled_when_lowering(monkeypatch):
    monkeypatch.delenv("ARCHLOOM_PLATFORM")
    for platform in ("tpu", "cpu"):
        text = lowered(platform)
        assert ("tpu_custom_call" in text, "cosine" in text) == (platform == "tpu", platform == "cpu")
    x = jnp.linspace(0, 1, 4 * 128).reshape(4, 128)
    want = jnp.cos(x)
    scanned = lambda x: jax.lax.scan(lambda c, x: (c, op(x[None])), 0, x)[1].sum()  # noqa: E731
    for each in (lambda x: op(x).sum(), lambda x: jax.vmap(op)(x[:, None]).sum(), jax.checkpoint(scanned)):
        assert jnp.allclose(jax.jit(jax.grad(each))(x), want)


def test_known_platform_traces_one_form(monkeypatch):
    monkeypatch.delenv("ARCHLOOM_PLATFORM")
    seen = []
    table = {"chunked": lambda x: seen.append(dispatch.platform()) or x, "pallas_tpu": lambda x: seen.append("t") or x}
    with dispatch.target("tpu", "TPU v5 lite"):
        dispatch.call("op", table, None, AUTO, jnp.ones(3))
        assert dispatch.device_kind() == "TPU v5 lite"
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        dispatch.call("op", table, None, AUTO, jnp.ones(3))
    assert seen == ["t", "cpu"]
    with pytest.raises(ValueError, match="platform must be one of"), dispatch.target("gpu"):
        pass


def test_a_kernel_named_on_another_platform_is_refused():
    with pytest.raises(NotImplementedError, match="runs on tpu, and this program is lowered for cpu"):
        op(jnp.ones((8, 128)), "pallas_tpu")
    with mosaic_tpu.interpret():
        assert jnp.allclose(op(jnp.ones((8, 128)), "pallas_tpu"), 2)


def test_results_are_cast_to_the_dtypes_of_the_op():
    (y,) = dispatch.call("op", {"a": lambda x: (x,)}, "a", ("a",), jnp.ones(3), dtypes=(jnp.bfloat16,))
    assert y.dtype == jnp.bfloat16


def test_too_much_vmem_is_refused_with_the_bytes():
    with pytest.raises(NotImplementedError, match=r"double_forward: .* 64.0 MiB of VMEM, more than the 16 MiB"):
        _kernel(jnp.zeros((32, 128 * 1024)))
