"""Memory of a gradient on a TPU: at most as much as the inputs beside them, at every length, so linear in it.

Heads are given as a projection leaves them, [B T H*K]: an array [B T H K] lies in other tiles, and an argument of that
shape would be copied before the kernel, where between a projection and the kernel no array of that shape is made.
"""

import functools
import importlib
import os

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import dispatch

LENGTHS = (4096, 16_384, 65_536, 131_072)
SHORT = {"long_conv": (4096, 8192)}  # the longest its kernel takes
H, K, D, N = 4, 128, 512, 16

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place():
    pytest.importorskip("libtpu", reason="the TPU compiler is in the extra `aot`")
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def cases(op, length):
    """(function, shapes of its inputs) of an op at a length, bf16, one row."""
    heads, gate, flat = (1, length, H, K), (1, length, H), (1, length, D)
    found = {
        "attention": (lambda f, q, k, v: f(q, k, v, causal=True), [heads] * 3),
        "linear_attention": (lambda f, q, k, v: f(q, k, v)[0], [heads] * 3),
        "linear_attention head": (lambda f, q, k, v, g: f(q, k, v, g)[0], [heads] * 3 + [gate]),
        "linear_attention channel": (lambda f, q, k, v, g: f(q, k, v, g)[0], [heads] * 4),
        "delta_rule": (lambda f, q, k, v, b: f(q, k, v, b)[0], [heads] * 3 + [gate]),
        "delta_rule gated": (lambda f, q, k, v, b, g: f(q, k, v, b, g)[0], [heads] * 3 + [gate] * 2),
        "selective_scan": (lambda f, *a: f(*a)[0], [flat, flat, (D, N), (1, length, N), (1, length, N)]),
        "linear_recurrence": (lambda f, a, b: f(a, b)[0], [flat] * 2),
        "causal_conv": (lambda f, x, w: f(x, w), [flat, (4, D)]),
        "long_conv": (lambda f, x, w: f(x, w), [flat, (length, D)]),
    }[op]
    name = op.split()[0]
    return functools.partial(found[0], getattr(importlib.import_module(f"kernels_pallas.{name}"), name)), found[1]


def memory(op, length, place):
    """(bytes of temporaries, of inputs) of the gradient with respect to all inputs, the cotangent one of them."""
    inner, shapes = cases(op, length)

    def function(*arguments):
        y = inner(*(x.reshape(*x.shape[:2], H, K) if x.shape[2:] == (H * K,) and heads else x for x in arguments))
        return (y[0] if isinstance(y, tuple) else y).reshape(1, length, -1)

    heads = any(len(shape) == 4 for shape in shapes)
    shapes = [(*shape[:2], shape[2] * shape[3]) if len(shape) == 4 else shape for shape in shapes]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
    with dispatch.target("tpu", "TPU v5 lite"):
        y = jax.eval_shape(function, *arguments)
        dy = jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=place)

        def gradient(dy, *arguments):
            return jax.vjp(function, *arguments)[1](dy)

        compiled = jax.jit(gradient).lower(dy, *arguments).compile()
    assert "tpu_custom_call" in compiled.as_text()
    found = compiled.memory_analysis()
    return found.temp_size_in_bytes, found.argument_size_in_bytes


OPS = ["attention", "linear_attention", "linear_attention head", "linear_attention channel", "delta_rule"]
OPS += ["delta_rule gated", "selective_scan", "linear_recurrence", "causal_conv", "long_conv"]


@pytest.mark.parametrize("op", OPS)
def test_temporaries_are_at_most_the_inputs(op, place):
    found = {length: memory(op, length, place) for length in SHORT.get(op, LENGTHS)}
    print(op, {length: f"{temp / 2**20:.1f} of {inputs / 2**20:.1f} MiB" for length, (temp, inputs) in found.items()})
    for length, (temp, inputs) in found.items():
        assert temp <= inputs, f"at {length} {temp / 2**20:.1f} MiB beside {inputs / 2**20:.1f} MiB of inputs"
