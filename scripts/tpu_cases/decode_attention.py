"""Attention of one new token: grouped heads over long caches, one key head a query head, a window."""

import jax
import jax.numpy as jnp

from kernels_pallas import costs
from kernels_pallas.decode_attention.pallas_tpu import decode_attention_tpu
from scripts.tpu_cases import Case


def _case(dtype, batch, keys, heads, groups, width, window=None):
    cache = jax.ShapeDtypeStruct((batch, keys, groups, width), dtype)
    arrays = (
        jax.ShapeDtypeStruct((batch, heads, width), dtype),
        cache,
        cache,
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )

    def function(q, k_cache, v_cache, lengths, *, chunk=None):
        return decode_attention_tpu(q, k_cache, v_cache, lengths, window=window, scale=width**-0.5, chunk=chunk)

    name = f"{'bf16' if dtype == jnp.bfloat16 else 'fp32'} {batch}x{keys}x{heads}/{groups}x{width}"
    name += f" window {window}" if window else ""
    size = jnp.dtype(dtype).itemsize
    read = keys if window is None else window
    cost = costs.decode_attention(batch, heads, groups, read, width, width, itemsize=size)
    options = {"chunk": (128, 256, 512, 1024, 2048)}
    return Case(name, function, arrays, batch * groups * read, cost.bytes, 0.0, options, backward=False)


CASES = [
    _case(jnp.bfloat16, 8, 32768, 32, 8, 128),
    _case(jnp.float32, 8, 32768, 32, 8, 128),
    _case(jnp.bfloat16, 8, 8192, 16, 16, 128),
    _case(jnp.bfloat16, 8, 32768, 32, 8, 128, window=4096),
]
