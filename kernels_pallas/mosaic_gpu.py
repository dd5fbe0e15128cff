"""How every GPU kernel is called (Pallas Mosaic GPU, Hopper): its device, dtypes and shared memory, batches by vmap,
and interpretation on a CPU for the tests.

Three things are done for the kernels in one way. Matrix products go from shared memory through `product`, both
operands there, so that what the interpreter proves is what is compiled. A kernel has a batch axis of its own, and
`over_rows` folds what vmap adds into it (plgpu.kernel would batch the kernel's body). Everything that cannot run is
refused with the reason before the compiler sees it.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

SHARED = 227 << 10  # bytes of shared memory a block may use on Hopper
HOPPER = ("H100", "H200", "H800", "H20", "GH200")  # device kinds of compute capability 9.0 hold one of these
ROWS = 64  # of a warpgroup's matrix product

Interpret = Any  # plgpu.InterpretGPUParams, or False; jax 0.10 does not have the class

_interpret = jax.make_user_context(False)


@contextmanager
def interpret(mode: Interpret = True) -> Iterator[None]:
    """Kernels called within run on any platform by interpretation: True, or a plgpu.InterpretGPUParams. The GPU's
    memories, barriers and copies are simulated; unwritten memory reads as NaN, and races can be detected."""
    with _interpret(parameters(mode)):
        yield


def interpreted() -> Interpret:
    """The mode of `interpret`, False outside of it."""
    return _interpret.value


def parameters(mode: Interpret) -> Interpret:
    """True as the class it stands for.

    Raises:
      NotImplementedError: this jax cannot interpret GPU kernels.
    """
    if not mode:
        return False
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError(
            f"jax {jax.__version__} cannot interpret kernels that use the GPU's matrix products; jax 0.12 can"
        )
    return plgpu.InterpretGPUParams() if mode is True else mode


def refuse(op: str, device_kind: str | None, *arrays: jax.Array | None) -> None:
    """Raises for devices other than Hopper, and for dtypes that the kernels do not take."""
    if device_kind is not None and not any(name in device_kind for name in HOPPER):
        raise NotImplementedError(
            f"{op}: the GPU kernels need compute capability 9.0 (H100, H200), not {device_kind!r}; use 'chunked'"
        )
    dtypes = {jnp.dtype(x.dtype) for x in arrays if x is not None}
    if dtypes not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float16")}):
        raise NotImplementedError(
            f"{op}: the GPU kernels take bfloat16 or float16, all alike, not {sorted(d.name for d in dtypes)}: "
            "the matrix unit would round float32 to 10 bits; cast, or use 'chunked'"
        )


def tile(shape: Sequence[int], dtype: Any) -> Any:
    """Shared memory for an operand of `product`: rows and columns in the swizzled tiles that the matrix unit reads.

    Columns are a multiple of 128 bytes, or 32 or 64 bytes in all.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = min(128, shape[-1] * size)
    if swizzle not in (32, 64, 128) or shape[-1] * size % swizzle:
        raise ValueError(f"mosaic_gpu.tile: {shape} of {dtype} is not made of rows of 128 bytes")
    return plgpu.SMEM(
        tuple(shape),
        dtype,
        transforms=(plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)),
    )


def call(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: dict[str, int],
    out_type: Any,
    scratch: dict[str, Any],
    cost: pl.CostEstimate,
    interpret: Interpret | None = None,
    approximate: bool = True,
) -> Callable[..., Any]:
    """The plgpu.kernel of a GPU kernel of one warpgroup a block, to be applied to its arrays.

    Args:
      name: of the kernel in profiles, "<op>_forward" or "<op>_backward...".
      grid: the axes by name, the first the one that changes fastest.
      scratch: shared memory and barriers by the name of the kernel's keyword.
      interpret: None as the context `interpret` says.
      approximate: exponentials to about 22 bits.

    Raises:
      NotImplementedError: the scratch exceeds the shared memory of a block.
    """
    refuse_bytes(name, nbytes(*scratch.values()))
    given: Any = {"cost_estimate": cost} if "cost_estimate" in inspect.signature(plgpu.kernel).parameters else {}
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(approx_math=approximate, lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name=name,
        interpret=(interpreted() if interpret is None else interpret) or None,
        **given,
    )


def nbytes(*scratch: Any) -> int:
    """Shared memory of scratch; barriers count nothing."""
    arrays = [s for s in scratch if hasattr(s, "shape") and hasattr(s, "dtype")]
    return sum(math.prod(s.shape) * jnp.dtype(s.dtype).itemsize for s in arrays)


def refuse_bytes(name: str, need: int) -> None:
    """Raises where a kernel's tiles do not fit into shared memory; 2 KiB are the compiler's and the barriers'."""
    if need > SHARED - 2048:
        raise NotImplementedError(
            f"{name}: its tiles need {need / 1024:.0f} KiB of shared memory, more than the {SHARED >> 10} KiB of a "
            "block; take narrower heads, or 'chunked'"
        )


def over_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays that all begin with the batch axis, and under vmap one call with a longer batch."""

    @custom_vmap
    def each(*arrays):
        return function(*arrays)

    @each.def_vmap
    def rule(size, batched, *arrays):
        wide = (x if one else jnp.broadcast_to(x, (size, *x.shape)) for x, one in zip(arrays, batched))
        folded = each(*(x.reshape(-1, *x.shape[2:]) for x in wide))
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), folded)
        return out, jax.tree.map(lambda _: True, out)

    return each


# Inside kernels.


def transposed(ref: Any) -> Any:
    """A view [n m] of shared memory [m n]."""
    return plgpu.transpose_ref(ref, (1, 0)) if _before_12() else ref.transpose((1, 0))


def load(ref: Any, layout: Any = plgpu.Layout.WGMMA) -> jax.Array:
    """Shared memory in the registers of a matrix product's result, or by_row or by_column of it."""
    read: Any = plgpu.load
    return read(ref, (), layout=layout) if _before_12() else read(ref, layout=layout)


def by_row(ref: Any) -> jax.Array:
    """[m], each entry where row m of a result [m n] is."""
    return load(ref, plgpu.Layout.WGMMA.reduce(1))


def by_column(ref: Any) -> jax.Array:
    """[n], each entry where column n of a result [m n] is."""
    return load(ref, plgpu.Layout.WGMMA.reduce(0))


def across(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[m] to [m n]."""
    return jax.lax.broadcast_in_dim(rows, shape, (0,))


def down(columns: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[n] to [m n]."""
    return jax.lax.broadcast_in_dim(columns, shape, (1,))


def numbers(shape: tuple[int, ...], axis: int) -> jax.Array:
    """[m n] of row numbers (axis 0) or column numbers (axis 1)."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def zeros(shape: tuple[int, ...]) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def product(shape: tuple[int, ...], *pairs: tuple[Any, Any]) -> jax.Array:
    """The sum of a @ b over pairs of references to shared memory, [m n] in float32."""

    def run(total):
        for a, b in pairs:
            plgpu.wgmma(total, a, b)
        return total[...]

    return pl.run_scoped(run, plgpu.ACC((shape[0], shape[1]), jnp.float32))


def _before_12() -> bool:
    return "idx" in inspect.signature(plgpu.load).parameters
