"""How every TPU kernel is called: its cost, the VMEM it needs, and interpretation on a CPU for the tests."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

VMEM = 16 << 20  # bytes a kernel gets unless it asks for more: the compiler's own default on v5e
MOST = 60 << 20  # bytes a kernel may ask for: v5p and TPU7x have 64 MiB, and the compiler keeps some

Interpret = bool | pltpu.InterpretParams

_interpret = jax.make_user_context(False)


@contextmanager
def interpret(mode: Interpret = True) -> Iterator[None]:
    """Kernels called within run on any platform by interpretation: True is quick; InterpretParams simulates the TPU's
    memories, fills unwritten ones with NaN and can detect races."""
    with _interpret(mode):
        yield


def interpreted() -> Interpret:
    """The mode of `interpret`, False outside of it."""
    return _interpret.value


def call(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: Sequence[int],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Any,
    out_shape: Any,
    scratch_shapes: Sequence[Any] = (),
    semantics: Sequence[Literal["parallel", "arbitrary"]],
    cost: pl.CostEstimate,
    interpret: Interpret | None = None,
    scalar_prefetch: int = 0,
    vmem: int | None = None,
    working: int = 0,
    dtypes: Sequence[Any] = (),
    aliases: dict[int, int] | None = None,
) -> Callable[..., Any]:
    """The pallas_call of a TPU kernel, to be applied to its arrays.

    Args:
      name: of the kernel in profiles and schedules, "<op>_forward" or "<op>_backward...".
      semantics: of each grid axis, "parallel" or "arbitrary" (sequential).
      interpret: None as the context `interpret` says.
      scalar_prefetch: how many leading arguments are tables that the index maps read.
      vmem: bytes the kernel may use, the compiler's default if None.
      working: bytes of values that live at once inside the kernel, counted beside blocks and scratch.
      dtypes: of the inputs in the order of in_specs; those not given count 4 bytes an element.

    Raises:
      NotImplementedError: blocks (two of each for the pipeline, or what pl.Buffered says), scratch and working exceed
        the limit.
    """
    limit = VMEM if vmem is None else vmem
    outs = jax.tree.leaves(out_shape)
    blocks = [(spec, dtypes[n] if n < len(dtypes) else jnp.float32) for n, spec in enumerate(in_specs)]
    blocks += [(spec, out.dtype) for spec, out in zip(jax.tree.leaves(out_specs, is_leaf=_is_spec), outs)]
    need = working + sum(
        _buffers(spec) * _bytes(spec.block_shape, dtype) for spec, dtype in blocks if spec.block_shape is not None
    )
    need += sum(_bytes(s.shape, s.dtype) for s in scratch_shapes if hasattr(s, "shape") and hasattr(s, "dtype"))
    if need > limit or limit > MOST:
        raise NotImplementedError(
            f"{name}: its blocks and scratch need {need / 2**20:.1f} MiB of VMEM, more than the "
            f"{limit / 2**20:.0f} MiB it may use; take smaller tiles or narrower heads"
        )
    mode = interpreted() if interpret is None else interpret
    return pl.pallas_call(
        kernel,
        name=name,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=scalar_prefetch,
            grid=tuple(grid),
            in_specs=list(in_specs),
            out_specs=out_specs,
            scratch_shapes=list(scratch_shapes),
        ),
        input_output_aliases=aliases or {},
        compiler_params=pltpu.CompilerParams(dimension_semantics=tuple(semantics), vmem_limit_bytes=vmem),
        cost_estimate=cost,
        interpret=mode,
    )


def refuse_float16(op: str, *arrays: jax.Array | None) -> None:
    """Raises for the dtypes that the TPU has no kernels for."""
    for array in arrays:
        if array is not None and array.dtype == jnp.float16:
            raise NotImplementedError(f"{op}: the TPU has no float16; use bfloat16 or float32")


def _is_spec(x):
    return isinstance(x, pl.BlockSpec)


def _buffers(spec):
    """Of a block: two for the pipeline, unless its BlockSpec says pl.Buffered(1)."""
    return 2 if spec.pipeline_mode is None else spec.pipeline_mode.buffer_count


def _bytes(shape, dtype):
    """Of a block in VMEM, whose last two axes are filled up to whole tiles of (8 to 32, 128)."""
    size = jnp.dtype(dtype).itemsize
    *lead, rows, columns = (1, 1, *(n for n in shape if isinstance(n, int)))
    tile = 8 * max(1, 4 // size)
    return math.prod(lead) * -(-rows // tile) * tile * -(-columns // 128) * 128 * size
