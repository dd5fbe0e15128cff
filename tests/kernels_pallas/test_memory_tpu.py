"""Memory of a gradient on a TPU: at most as much as the inputs beside them, at every length, so linear in it.

Long sequences are compiled for v5e, one length for every generation. Heads are given as a projection leaves them,
[B T H*K]: an array [B T H K] lies in other tiles, and an argument of that shape would be copied before the kernel;
between a projection and the kernel none of that shape is made. Complex numbers are given as two planes for the same
reason: a complex64 argument is split into them at the boundary.
"""

import functools
import importlib
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "scripts"))

import tpu_compile

LENGTHS = (16_384, 65_536, 131_072)
SHORT = {"long_conv": (8192,)}  # the longest its kernel takes
H, K, D, N = 4, 128, 512, 16

missing = tpu_compile.missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing), reason=missing or "libtpu is there")]
device = functools.cache(tpu_compile.device)


@pytest.fixture(scope="module", autouse=True)
def compiler():
    os.environ.update(tpu_compile.environment())
    jax.config.update("jax_enable_compilation_cache", False)  # a program for a TPU cannot be read back without one
    yield
    jax.config.update("jax_enable_compilation_cache", True)


def complex_planes(f, ar, ai, br, bi):
    h = f(jax.lax.complex(ar, ai), jax.lax.complex(br, bi))[0]
    return jnp.stack((h.real, h.imag), 2)


def cases(op, length):
    """(function, shapes of its inputs) of an op at a length, one row."""
    heads, gate, flat = (1, length, H, K), (1, length, H), (1, length, D)
    found = {
        "attention": (lambda f, q, k, v: f(q, k, v, causal=True), [heads] * 3),
        "linear_attention": (lambda f, q, k, v: f(q, k, v)[0], [heads] * 3),
        "linear_attention normalize": (lambda f, q, k, v: f(q, k, v, normalize=True)[0], [heads] * 3),
        "linear_attention head": (lambda f, q, k, v, g: f(q, k, v, g)[0], [heads] * 3 + [gate]),
        "linear_attention channel": (lambda f, q, k, v, g: f(q, k, v, g)[0], [heads] * 4),
        "delta_rule": (lambda f, q, k, v, b: f(q, k, v, b)[0], [heads] * 3 + [gate]),
        "delta_rule gated": (lambda f, q, k, v, b, g: f(q, k, v, b, g)[0], [heads] * 3 + [gate] * 2),
        "selective_scan": (lambda f, *a: f(*a)[0], [flat, flat, (D, N), (1, length, N), (1, length, N)]),
        "linear_recurrence": (lambda f, a, b: f(a, b)[0], [flat] * 2),
        "linear_recurrence complex": (complex_planes, [flat] * 4),
        "causal_conv": (lambda f, x, w: f(x, w), [flat, (4, D)]),
        "long_conv": (lambda f, x, w: f(x, w), [flat, (length, D)]),
    }[op]
    name = op.split()[0]
    return functools.partial(found[0], getattr(importlib.import_module(f"kernels_pallas.{name}"), name)), found[1]


def memory(op, length, generation):
    """(bytes of temporaries, of inputs) of the gradient with respect to all inputs, the cotangent one of them.

    Inputs are bf16, planes of complex numbers float32.
    """
    inner, shapes = cases(op, length)

    def function(*arguments):
        y = inner(*(x.reshape(*x.shape[:2], H, K) if x.shape[2:] == (H * K,) and heads else x for x in arguments))
        return (y[0] if isinstance(y, tuple) else y).reshape(1, length, -1)

    heads = any(len(shape) == 4 for shape in shapes)
    shapes = [(*shape[:2], shape[2] * shape[3]) if len(shape) == 4 else shape for shape in shapes]
    place = jax.sharding.SingleDeviceSharding(device(generation))
    dtype = jnp.float32 if "complex" in op else jnp.bfloat16
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in shapes]
    with tpu_compile.target(device(generation)):
        y = jax.eval_shape(function, *arguments)
        dy = jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=place)

        def gradient(dy, *arguments):
            return jax.vjp(function, *arguments)[1](dy)

        compiled = jax.jit(gradient).lower(dy, *arguments).compile()
    assert "tpu_custom_call" in compiled.as_text()
    found = compiled.memory_analysis()
    return found.temp_size_in_bytes, found.argument_size_in_bytes


OPS = ["attention", "linear_attention", "linear_attention normalize", "linear_attention head"]
OPS += ["linear_attention channel", "delta_rule", "delta_rule gated", "selective_scan", "linear_recurrence"]
OPS += ["linear_recurrence complex", "causal_conv", "long_conv"]


def check(op, generation, *lengths):
    for length in lengths:
        temporaries, inputs = (size / 2**20 for size in memory(op, length, generation))
        found = f"{op}, {generation}, {length}: {temporaries:.1f} MiB beside {inputs:.1f} MiB of inputs"
        print(found)
        assert temporaries <= inputs, found


@pytest.mark.parametrize("generation", tpu_compile.TOPOLOGIES)
@pytest.mark.parametrize("op", OPS)
def test_temporaries_are_at_most_the_inputs(op, generation):
    check(op, generation, 4096)


@pytest.mark.parametrize("op", OPS)
def test_temporaries_of_long_sequences(op):
    check(op, "v5e", *SHORT.get(op, LENGTHS))
