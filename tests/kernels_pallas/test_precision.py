"""float32 is multiplied as float32: the products of every op, forward and backward, by their precision in the jaxpr.

A CPU multiplies float32 exactly whatever is asked, so no result here can show what TF32 or bfloat16 passes would do.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arch.ops import ssm
from arch.ops.favor import project
from arch.ops.linear import global_linear_attention
from kernels_pallas import dispatch
from kernels_pallas.attention import api as attention_api
from kernels_pallas.attention import attention
from kernels_pallas.causal_conv import causal_conv
from kernels_pallas.decode_attention import decode_attention
from kernels_pallas.delta_rule import api as delta_rule_api
from kernels_pallas.delta_rule import chunked as delta_rule_chunked
from kernels_pallas.linear_attention import api as linear_attention_api
from kernels_pallas.linear_attention import chunked as linear_attention_chunked
from kernels_pallas.linear_attention import linear_attention
from kernels_pallas.long_conv import api as long_conv_api
from kernels_pallas.selective_scan import api as selective_scan_api
from tests.kernels_pallas.op_cases import CASES, QKV, OpCase, gradients

BLOCKS = np.tril(np.ones((8, 8), bool)) & ~np.tril(np.ones((8, 8), bool), -2)
MORE = {
    "attention_blocks": OpCase(functools.partial(attention, causal=False, block_mask=BLOCKS), QKV),
    "attention_bias": OpCase(lambda q, k, v, b: attention(q, k, v, causal=True, bias=b[:1, None]), (*QKV, "btt")),
    "attention_sigmoid": OpCase(functools.partial(attention, causal=False, activation="sigmoid"), QKV),
    "decode_attention": OpCase(lambda q, k, v: decode_attention(q[:, 0], k, v, jnp.array([5, 9])), QKV),
    "causal_conv": OpCase(lambda x, f: causal_conv(x, f[:4])[0], ("BTD", "tD")),
    "linear_attention_normalized": OpCase(lambda *a: linear_attention(*a, normalize=True)[0], QKV),
}
NAMED = {  # implementations that AUTO leaves aside are asked for by name
    "attention": (attention_api, ("ref", "chunked", "pallas_tpu")),
    "linear_attention_channel": (linear_attention_api, ("ref", "chunked", "pallas_tpu")),
    "delta_rule_gated": (delta_rule_api, ("ref", "chunked", "pallas_tpu")),
    "selective_scan": (selective_scan_api, ("ref", "chunked", "pallas_tpu")),
    "long_conv": (long_conv_api, ("ref", "fft", "pallas_tpu")),
}
KINDS = {"cpu": None, "cuda": "NVIDIA H200", "rocm": None, "tpu": "TPU v5 lite"}


def equations(jaxpr):
    """Of a jaxpr and of all inside it, kernels included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)  # closed or not
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def rounded(function, *args):
    """The float32 products that a GPU or a TPU would round, as text."""
    found = []
    for equation in equations(jax.make_jaxpr(function)(*args).jaxpr):
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            dtypes = {x.aval.dtype for x in equation.invars[:2]}
            if jnp.dtype("float32") in dtypes and not _highest(equation):
                found.append(str(equation))
    return found


def _highest(equation):
    precision = equation.params["precision"]
    return precision is not None and set(precision) == {jax.lax.Precision.HIGHEST}


def case(name, dtype="float32"):
    chosen = (CASES | MORE)[name]
    return chosen.function, [jax.ShapeDtypeStruct(x, dtype) for x in chosen.shapes(2, 256, 2, 32)]


@pytest.mark.parametrize("name", [*CASES, *MORE])
@pytest.mark.parametrize("platform", KINDS)
def test_float32_is_not_rounded(name, platform):
    """What AUTO takes on each platform; "ref" is among the rest below."""
    function, args = case(name)
    with dispatch.target(platform, KINDS[platform]):
        assert not rounded(gradients(function), *args)


@pytest.mark.parametrize("name", NAMED)
def test_every_implementation(name, monkeypatch):
    api, names = NAMED[name]
    function, args = case(name)
    for implementation in names:
        platform = "tpu" if implementation == "pallas_tpu" else "cuda"
        monkeypatch.setattr(api, "AUTO", (implementation,))
        with dispatch.target(platform, KINDS[platform]):
            assert not rounded(gradients(function), *args), implementation


def test_ops_of_the_mixers():
    """What the mixers add around the ops."""
    ratio, into, out = (jax.ShapeDtypeStruct(shape, "complex64") for shape in ((16,), (16, 32), (32, 16)))
    x = jax.ShapeDtypeStruct((2, 64, 32), "float32")
    q, rows = jax.ShapeDtypeStruct((2, 64, 2, 16), "float32"), jax.ShapeDtypeStruct((24, 16), "float32")
    with dispatch.target("cuda", "NVIDIA H200"):
        assert not rounded(gradients(lambda x, r, i, o: ssm.diagonal_ssm(x, r, i, (o, o))), x, ratio, into, out)
        assert not rounded(gradients(lambda q, k, v: global_linear_attention(q, k, v)), q, q, q)
        assert not rounded(gradients(project), q, rows)


def test_the_caller_may_ask_for_less():
    """A precision set around the whole program holds; sums of decays stay exact."""
    function, args = case("delta_rule_gated")
    with dispatch.target("cuda", "NVIDIA H200"), jax.default_matmul_precision("tensorfloat32"):
        found = [e for e in equations(jax.make_jaxpr(gradients(function))(*args).jaxpr) if "dot" in e.primitive.name]
        exact = [_highest(e) for e in found]
    assert any(exact)
    assert not all(exact)


def test_16_bits_keep_the_default():
    """Six passes on a TPU for what has 8 bits would be waste."""
    for name in ("attention", "linear_attention", "delta_rule"):
        function, args = case(name, "bfloat16")
        with dispatch.target("cuda", "NVIDIA A100"):
            found = [
                e for e in equations(jax.make_jaxpr(gradients(function))(*args).jaxpr) if "dot" in e.primitive.name
            ]
        assert not all(_highest(e) for e in found), name


def exponents(jaxpr, given, found):
    """Adds to `found` the products of what comes from `given` and has not been exponentiated yet; gives the outputs
    that have not."""
    tainted = {v for v, yes in zip(jaxpr.invars, given, strict=True) if yes}
    for equation in jaxpr.eqns:
        mine = [not hasattr(v, "val") and v in tainted for v in equation.invars]
        if not any(mine) or equation.primitive.name == "exp":
            continue
        made = [True] * len(equation.outvars)
        if equation.primitive.name in ("jit", "pjit"):
            made = exponents(equation.params["jaxpr"].jaxpr, mine, found)
        elif equation.primitive.name == "dot_general":
            found.append(equation)
        tainted |= {v for v, yes in zip(equation.outvars, made) if yes}
    return [not hasattr(v, "val") and v in tainted for v in jaxpr.outvars]


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda g: delta_rule_chunked._decay(g), [(64,)]),
        (lambda q, k, g: linear_attention_chunked._scalar_decay(q, k, g), [(64, 8), (64, 8), (64,)]),
        (lambda q, k, g: linear_attention_chunked._vector_decay(q, k, g), [(64, 8)] * 3),
    ],
    ids=["delta_rule", "linear_attention_head", "linear_attention_channel"],
)
def test_sums_of_decays_are_exact(function, shapes):
    """Whatever the dtype of the rest: no context of theirs is around."""
    jaxpr = jax.make_jaxpr(function)(*(jnp.zeros((1, 1, *shape)) for shape in shapes)).jaxpr
    found: list = []
    exponents(jaxpr, [n == len(shapes) - 1 for n in range(len(shapes))], found)
    assert len(found) >= 3
    assert all(_highest(equation) for equation in found)
