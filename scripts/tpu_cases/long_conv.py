"""Long convolution: Hyena's channels, at lengths up to the longest of the kernel."""

import jax
import jax.numpy as jnp

from kernels_pallas.long_conv.pallas_tpu import long_conv_tpu
from scripts.tpu_cases import Case


def _case(dtype, batch, length, width):
    arrays = jax.ShapeDtypeStruct((batch, length, width), dtype), jax.ShapeDtypeStruct((length, width), jnp.float32)

    def function(x, filter, *, parts=None):
        return long_conv_tpu(x, filter, parts=parts)

    name = f"{'bf16' if dtype == jnp.bfloat16 else 'fp32'} {batch}x{length}x{width}"
    size, taps = batch * length * width * jnp.dtype(dtype).itemsize, length * width * 4
    options = {"parts": (2, 3)}
    return Case(name, function, arrays, batch * length * width / 1024, 2 * size + taps, 3 * size + 2 * taps, options)


CASES = [_case(jnp.bfloat16, 4, 4096, 768), _case(jnp.float32, 4, 4096, 768), _case(jnp.bfloat16, 2, 8192, 768)]
