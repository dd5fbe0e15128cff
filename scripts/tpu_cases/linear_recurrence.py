"""linear_recurrence's documented TPU shapes: RG-LRU's width, a time-invariant a (S5, LRU), complex numbers."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.linear_recurrence.pallas_tpu import linear_recurrence_tpu
from scripts.tpu_cases import Case

OPTIONS = {"tile": ((128, 512), (256, 256), (256, 512), (256, 1024), (512, 512))}


def case(dtype: str, kind: str, batch: int, length: int, width: int, *, record: bool = True) -> Case:
    """Complex arrays are counted as the pairs of float32 that they are."""
    full = jax.ShapeDtypeStruct((batch, length, width), dtype)
    constant, is_complex = "constant" in kind, dtype == "complex64"
    a = jax.ShapeDtypeStruct((width,), dtype) if constant else full
    state = jax.ShapeDtypeStruct((batch, width), jnp.complex64 if is_complex else jnp.float32)
    elements = batch * length * width
    each = elements * jnp.dtype(dtype).itemsize
    return Case(
        name=f"{dtype} {batch}x{length}x{width} {kind}",
        function=functools.partial(linear_recurrence_tpu, reset=None, reverse=False),
        arguments=(a, full, state),
        per=elements,
        bytes_forward=(2 if constant else 3) * each,
        bytes_backward=(3 if constant else 5) * each,
        options={} if constant or is_complex else OPTIONS,
        record=record,
    )


CASES = [
    case("float32", "a a token", 8, 4096, 2560),
    case("bfloat16", "a a token", 8, 4096, 2560),
    case("float32", "constant a", 4, 4096, 1024),
    case("complex64", "constant a", 1, 4096, 1024),
]
