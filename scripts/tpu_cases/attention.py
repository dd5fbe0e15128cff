"""attention's documented TPU shapes: causal, a window, heads of 64 and 256, grouped heads."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.attention import tiles_tpu
from kernels_pallas.attention.pallas_tpu import attention_tpu
from kernels_pallas.attention.pallas_tpu_table import KIND, LAST, MASKED, NONE, STATIC, table
from kernels_pallas.attention.pallas_tpu_tile import Mask
from scripts.tpu_cases import Case

FORWARD = [(512, 512, 256, 256), (1024, 512, 256, 256), (1024, 1024, 256, 256), (512, 1024, 256, 256)]
BACKWARD = [
    (1024, 1024, 256, 256),
    (512, 512, 256, 256),
    (512, 1024, 256, 256),
    (1024, 512, 256, 256),
    (512, 512, 512, 128),
]


def case(dtype, batch, length, heads, groups, width, window=None, *, record=True):
    """Heads lie side by side, [B T H*K], as a projection leaves them."""
    q, k = (jax.ShapeDtypeStruct((batch, length, n * width), dtype) for n in (heads, groups))
    size, rows = jnp.dtype(dtype).itemsize, batch * length
    least = rows * width * size * (2 * heads + 2 * groups)
    kind = "causal" if window is None else f"window {window}"
    grouped = "" if groups == heads else f" in {groups} groups"
    return Case(
        name=f"{dtype} {batch}x{length}x{heads}x{width} {kind}{grouped}",
        function=functools.partial(_call, heads=heads, groups=groups, window=window),
        arguments=(q, k, k),
        per=rows * heads,
        bytes_forward=least,
        bytes_backward=2 * least,
        options={"forward": FORWARD, "backward": BACKWARD} if dtype == "bfloat16" else {},
        record=record,
        shares=functools.partial(
            _shares, shape=(length, length, heads, groups, width, width), dtype=dtype, window=window
        ),
    )


def _call(q, k, v, *, heads, groups, window, **options):
    q, k, v = (x.reshape(*x.shape[:2], n, -1) for x, n in ((q, heads), (k, groups), (v, groups)))
    width = q.shape[-1]
    y, _ = attention_tpu(
        *(q, k, v, None, None, None, None),
        window=(None if window is None else window - 1, 0),
        block_mask=None,
        scale=width**-0.5,
        activation="softmax",
        **options,
    )
    return y.reshape(*y.shape[:2], -1)


def _shares(*, shape, dtype, window, forward=None, backward=None):
    """Of the steps, those whose tile is of each kind, the kind with most parts to compute first; then row ends."""
    window = (None if window is None else window - 1, 0)
    plan = tiles_tpu.plan(
        *(shape, dtype),
        window=window,
        block_mask=None,
        marked=False,
        scale=1.0,
        activation="softmax",
        forward=forward,
        backward=backward,
        kind=dispatch.device_kind(),
    )
    found = {}
    for name, sizes, by_columns in (
        ("attention_forward", plan.forward, False),
        ("attention_backward", plan.backward, True),
        ("attention_backward_dq", plan.backward, False),
        ("attention_backward_dkv", plan.backward, True),
    ):
        tiles = table(plan, sizes, by_columns)
        kinds = tiles.flags & KIND
        work = {}
        for kind in tiles.kinds() - {NONE}:
            how = None if kind < MASKED else "any" if kind == MASKED else tiles.offsets[kind - STATIC]
            mask = Mask(plan, sizes, how, 0, 0)
            parts = [
                (c, r) for c in range(sizes.columns // sizes.part_columns) for r in range(sizes.rows // sizes.part_rows)
            ]
            work[kind] = sum(not mask.empty(c, r) for c, r in parts) + (0 if how is None else 0.1)
        order = sorted(work, key=lambda kind: -work[kind])
        ends = ((tiles.flags & LAST) > 0).mean()
        found[name] = (*((kinds == kind).mean() for kind in order), ends, ends)
    return found


CASES = [
    case("bfloat16", 4, 4096, 16, 16, 128),
    case("bfloat16", 1, 32768, 16, 16, 128, window=1024),
    case("bfloat16", 4, 4096, 16, 16, 64),
    case("bfloat16", 1, 4096, 8, 2, 256),
    case("float32", 1, 2048, 4, 4, 128, record=False),
]
