"""Short causal convolution: the channels of a Mamba layer, of a DeltaNet's q, k and v, and a packed row."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.causal_conv.pallas_tpu import causal_conv_tpu
from scripts.tpu_cases import Case


def _case(dtype, batch, length, width, taps, *, bias, activation, packed=False):
    x = jax.ShapeDtypeStruct((batch, length, width), dtype)
    arrays = [x, jax.ShapeDtypeStruct((taps, width), jnp.float32)]
    if bias:
        arrays.append(jax.ShapeDtypeStruct((width,), jnp.float32))
    if packed:
        arrays.append(jax.ShapeDtypeStruct((batch, length), jnp.int32))

    def function(x, filter, *rest, chunk=None, width=None):
        tiles = {name: value for name, value in (("chunk", chunk), ("width", width)) if value is not None}
        b = rest[0] if bias else None
        segments = rest[-1] if packed else None
        return causal_conv_tpu(x, filter, b, None, None, segments, activation=activation, **tiles)

    name = f"{'bf16' if dtype == jnp.bfloat16 else 'fp32'} {batch}x{length}x{width} taps {taps}"
    name += (" silu" if activation else "") + (" packed" if packed else "")
    size = batch * length * width
    item = jnp.dtype(dtype).itemsize
    options = {"chunk": (128, 256, 512, 1024), "width": (128, 256, 512, 1024)}
    return Case(name, function, tuple(arrays), size / 1024, 2 * size * item, 3 * size * item, options)


_case = functools.partial(_case, bias=True, activation="silu")

CASES = [
    _case(jnp.bfloat16, 4, 4096, 2048, 4),
    _case(jnp.float32, 4, 4096, 2048, 4),
    _case(jnp.bfloat16, 2, 8192, 3072, 4, bias=False, activation=None),
    _case(jnp.bfloat16, 1, 16384, 1024, 4, packed=True),
]
