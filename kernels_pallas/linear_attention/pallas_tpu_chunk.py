"""What one chunk of one head needs inside the TPU kernels: masks, exact sums of decays, pair weights."""

import jax
import jax.numpy as jnp

Array = jax.Array

FORGET = -1e4  # exp of this is 0 in float32, and sums of it stay finite where -inf would give nan


def dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """Matrix product over one axis of each, in float32; float32 operands keep all their digits."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def rows_columns(size: int) -> tuple[Array, Array]:
    """[C C] of row numbers, and of column numbers."""
    shape = (size, size)
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0), jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def parts(x: Array, count: int) -> list[Array]:
    """Float32 as a sum of bfloat16 numbers: all but the last are 8 bits each, cut off, so that the rest is exact."""
    out = []
    for _ in range(count - 1):
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
        high = jax.lax.bitcast_convert_type(bits, jnp.float32)
        out.append(high.astype(jnp.bfloat16))
        x = x - high
    return [*out, x.astype(jnp.bfloat16)]


def sums(x: Array, ones: Array, exact: bool, passes: int = 1) -> Array:
    """x @ ones for a boolean matrix: as float32 sums are, or of 8 bits of x a pass."""
    if exact:
        return dot(x, ones.astype(jnp.float32))
    first, *rest = (dot(part, _bfloat16(ones)) for part in parts(x, passes))
    return sum(rest, start=first)


def sums_left(ones: Array, x: Array, exact: bool) -> Array:
    """ones @ x for a boolean matrix: as float32 sums are, or of 8 bits of x."""
    return dot(ones.astype(jnp.float32), x) if exact else dot(_bfloat16(ones), x.astype(jnp.bfloat16))


def _bfloat16(ones):
    return ones.astype(jnp.float32).astype(jnp.bfloat16)
