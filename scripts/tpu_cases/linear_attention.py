"""linear_attention's documented TPU shapes: no decay, one a head, one a key channel; divided by the sum of weights."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.linear_attention.pallas_tpu import linear_attention_tpu
from scripts.tpu_cases import Case

OPTIONS = {"chunk": (64, 128, 256, 512), "step": (256, 512, 1024), "heads": (1, 2, 4)}


def case(
    dtype: str, decay: str, batch: int, length: int, heads: int, width: int, *, normalize=False, record: bool = True
) -> Case:
    shape = (batch, length, heads, width)
    arrays = [jax.ShapeDtypeStruct(shape, dtype)] * 3
    state = jax.ShapeDtypeStruct((batch, heads, width, width + normalize), jnp.float32)
    gate = {"plain": None, "head": shape[:3], "channel": shape}[decay]
    gates = [] if gate is None else [jax.ShapeDtypeStruct(gate, jnp.float32)]
    tokens = batch * length * heads
    each = width * jnp.dtype(dtype).itemsize
    decays = {"plain": 0, "head": 4, "channel": 4 * width}[decay]
    return Case(
        name=f"{dtype} {batch}x{length}x{heads}x{width} {decay}{' normalized' * normalize}",
        function=functools.partial(_call, gated=gate is not None, normalize=normalize),
        arguments=(*arrays, *gates, state),
        per=tokens,
        bytes_forward=tokens * (4 * each + decays),
        bytes_backward=tokens * ((7 + normalize) * each + 2 * decays),
        options=OPTIONS if width == 128 and dtype == "bfloat16" else {},
        record=record,
    )


def _call(*arrays, gated, normalize, **options):
    q, k, v, *rest = arrays
    return linear_attention_tpu(q, k, v, rest[0] if gated else None, rest[-1], normalize=normalize, **options)


CASES = [
    case("bfloat16", "plain", 2, 4096, 16, 128),
    case("bfloat16", "head", 2, 4096, 16, 128),
    case("bfloat16", "channel", 2, 4096, 16, 128),
    case("bfloat16", "head", 2, 4096, 16, 64),
    case("bfloat16", "plain", 2, 4096, 16, 128, normalize=True),
    case("bfloat16", "head", 2, 4096, 16, 128, normalize=True),
    case("bfloat16", "plain", 1, 512, 4, 64, normalize=True, record=False),
    case("float32", "plain", 1, 2048, 8, 128, normalize=True, record=False),
    case("float32", "plain", 1, 2048, 8, 128, record=False),
    case("float32", "head", 1, 2048, 8, 128, record=False),
    case("float32", "channel", 1, 2048, 4, 128, record=False),
]
