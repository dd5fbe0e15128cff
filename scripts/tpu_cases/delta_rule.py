"""delta_rule's documented TPU shapes: plain and gated, heads of 64, 128 and 256."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.delta_rule.pallas_tpu import delta_rule_tpu
from scripts.tpu_cases import Case

OPTIONS = {"chunk": (64, 128, 256), "units": (2, 4, 8, 16)}


def case(dtype: str, kind: str, batch: int, length: int, heads: int, width: int, *, record: bool = True) -> Case:
    """Heads lie side by side, [B T H*K], as a projection leaves them."""
    flat = jax.ShapeDtypeStruct((batch, length, heads * width), dtype)
    gates = [jax.ShapeDtypeStruct((batch, length, heads), jnp.float32)] * (2 if kind == "gated" else 1)
    state = jax.ShapeDtypeStruct((batch, heads, width, width), jnp.float32)
    tokens = batch * length * heads
    each = width * jnp.dtype(dtype).itemsize
    return Case(
        name=f"{dtype} {batch}x{length}x{heads}x{width} {kind}",
        function=functools.partial(_call, heads=heads),
        arguments=(flat, flat, flat, *gates, state),
        per=tokens,
        bytes_forward=tokens * (4 * each + 4 * len(gates)),
        bytes_backward=tokens * (7 * each + 8 * len(gates)),
        options=OPTIONS if width == 128 and dtype == "bfloat16" else {},
        record=record,
    )


def _call(*arrays, heads, **options):
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in arrays[:3])
    beta, decay = arrays[3], arrays[4] if len(arrays) == 6 else None
    y, state = delta_rule_tpu(q, k, v, beta, decay, arrays[-1], **options)
    return y.reshape(arrays[2].shape), state


CASES = [
    case("bfloat16", "plain", 2, 4096, 16, 128),
    case("bfloat16", "gated", 2, 4096, 16, 128),
    case("bfloat16", "gated", 2, 4096, 16, 64),
    case("bfloat16", "gated", 1, 4096, 8, 256),
    case("float32", "gated", 1, 2048, 8, 128, record=False),
]
