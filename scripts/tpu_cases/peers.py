"""What our attention is set beside: jax's own splash attention (jax.experimental.pallas.ops.tpu), forward and backward.

In its own layout [B H T D], so that no transpose is counted against it; tiles as options, the best of each case and
generation in BEST, found by `python scripts/tune_kernel.py peers` (results/kernels/tune.jsonl).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import dispatch
from scripts.tpu_cases import Case

TILES = {"block_q": 512, "block_kv": 512, "compute": 512}
# (block_q, block_kv, compute) by case, pass and device kind; fused: dq in the kernel of dk and dv
BEST: dict[tuple[str, str], dict[str, object]] = {}


def splash(q, k, v, *, window, name, block_q=None, block_kv=None, compute=None, fused=True):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    tiles = {**TILES, **BEST.get((name, dispatch.device_kind() or ""), {})}
    given = {"block_q": block_q, "block_kv": block_kv, "compute": compute}
    tiles.update({key: value for key, value in given.items() if value is not None})
    rows, columns, inner = tiles["block_q"], tiles["block_kv"], tiles["compute"]
    if inner > columns:
        raise NotImplementedError(f"compute {inner} exceeds block_kv {columns}")
    length, heads = q.shape[2], q.shape[1]
    one = masks.CausalMask((length, length))
    if window is not None:
        one = masks.LocalMask((length, length), (window - 1, 0), 0)
    sizes = kernel.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_kv_compute=inner,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_kv_dkv_compute=inner,
        block_q_dq=None if fused else rows,
        block_kv_dq=None if fused else columns,
        use_fused_bwd_kernel=fused,
    )
    attend = kernel.make_splash_mha_single_device(masks.MultiHeadMask([one] * heads), block_sizes=sizes)
    return jax.vmap(attend)(q, k, v)


def shares(*, length, heads, window, block_q=512, block_kv=512, fused=True, **_):
    """Of the grid's steps, those whose tile has a visible pair: the grid is as wide as the fullest row (or column)."""
    first = np.arange(0, length, block_q)
    low = np.zeros_like(first) if window is None else np.maximum(first - window + 1, 0) // block_kv
    high = np.minimum(first + block_q - 1, length - 1) // block_kv
    row_counts = high - low + 1
    rows, columns = len(first), length // block_kv
    visible = np.zeros((rows, columns), bool)
    for row, (a, b) in enumerate(zip(low, high)):
        visible[row, a : b + 1] = True
    tall = rows if fused else visible.sum(0).max()
    total = row_counts.sum()
    forward, across = total / (rows * row_counts.max()), total / (columns * tall)
    edges = (1 / row_counts.max(),) * 2  # what begins and ends a row of tiles
    return {
        "splash_mha_fwd_no_residuals": (forward, *edges),
        "splash_mha_fwd_residuals": (forward, *edges),
        "splash_mha_dq_no_residuals": (forward, *edges),
        "splash_mha_dkv_no_residuals": (across, *(1 / (heads * tall),) * 2),
    }


def _case(name, batch, length, heads, width, window=None):
    x = jax.ShapeDtypeStruct((batch, heads, length, width), jnp.bfloat16)
    size = batch * length * heads * width
    options = {
        "block_q": (512, 1024, 2048),
        "block_kv": (512, 1024, 2048),
        "compute": (256, 512, 1024),
        "fused": (True, False),
    }
    return Case(
        name,
        functools.partial(splash, window=window, name=name),
        (x, x, x),
        batch * length * heads,
        4 * size * 2,
        8 * size * 2,
        options,
        shares=functools.partial(shares, length=length, heads=heads, window=window),
        record=False,
    )


CASES = [
    _case("splash bf16 4x4096x16x128 causal", 4, 4096, 16, 128),
    _case("splash bf16 1x32768x16x128 window 1024", 1, 32768, 16, 128, window=1024),
    _case("splash bf16 4x4096x16x64 causal", 4, 4096, 16, 64),
]
