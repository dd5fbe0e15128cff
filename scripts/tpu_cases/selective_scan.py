"""selective_scan's documented TPU shapes: Mamba's, 16 states a channel, and wider states."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.selective_scan.pallas_tpu import selective_scan_tpu
from scripts.tpu_cases import Case

OPTIONS = {"tile": ((128, 256), (128, 512), (128, 1024), (256, 256), (256, 512))}


def case(dtype: str, batch: int, length: int, width: int, states: int, *, record: bool = True) -> Case:
    rows = jax.ShapeDtypeStruct((batch, length, width), dtype)
    pairs = jax.ShapeDtypeStruct((batch, length, states), dtype)
    arguments = (
        *(rows, rows),
        jax.ShapeDtypeStruct((width, states), jnp.float32),
        *(pairs, pairs),
        jax.ShapeDtypeStruct((width,), jnp.float32),
        jax.ShapeDtypeStruct((batch, width, states), jnp.float32),
    )
    elements = batch * length * width
    each = jnp.dtype(dtype).itemsize
    return Case(
        name=f"{dtype} {batch}x{length}x{width}x{states}",
        function=functools.partial(selective_scan_tpu, reset=None),
        arguments=arguments,
        per=elements,
        bytes_forward=each * (3 * elements + 2 * batch * length * states),
        bytes_backward=each * (5 * elements + 4 * batch * length * states),
        options=OPTIONS if states == 16 else {},
        record=record,
    )


CASES = [
    case("float32", 1, 4096, 2048, 16),
    case("bfloat16", 1, 4096, 2048, 16),
    case("bfloat16", 1, 4096, 1024, 64),
]
