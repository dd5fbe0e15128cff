"""Long convolution: Hyena's channels, at lengths up to the longest of the kernel."""

import jax
import jax.numpy as jnp

from kernels_pallas.long_conv.pallas_tpu import long_conv_tpu
from scripts.tpu_cases import Case


def _case(dtype, batch, length, width):
    arrays = jax.ShapeDtypeStruct((batch, length, width), dtype), jax.ShapeDtypeStruct((length, width), jnp.float32)

    def function(x, filter, *, at_once=None):
        return long_conv_tpu(x, filter, at_once=at_once)

    name = f"{'bf16' if dtype == jnp.bfloat16 else 'fp32'} {batch}x{length}x{width}"
    size, taps = batch * length * width * jnp.dtype(dtype).itemsize, length * width * 4
    options = {"at_once": (1, 2, 4, 8)}
    per = batch * length * width / 1024
    # the filter's transform at the first row of a block of channels, its gradient's at the last
    shares = {"long_conv_forward": (1 / batch,), "long_conv_backward": (1 / batch, 1 / batch)}
    return Case(name, function, arrays, per, 2 * size + taps, 3 * size + 2 * taps, options, shares=shares)


CASES = [_case(jnp.bfloat16, 4, 4096, 768), _case(jnp.float32, 4, 4096, 768), _case(jnp.bfloat16, 2, 8192, 768)]
