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

# block_q, block_kv and the columns computed at a time, by case and device kind: of the forward and of the backward pass
TILES = ((1024, 1024, 512), (1024, 1024, 1024))
BEST: dict[tuple[str, str], tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    ("splash bf16 4x4096x16x128 causal", "TPU v5 lite"): ((1024, 1024, 256), (1024, 1024, 1024)),
    ("splash bf16 4x4096x16x128 causal", "TPU v6 lite"): ((1024, 1024, 512), (1024, 1024, 1024)),
    ("splash bf16 1x32768x16x128 window 1024", "TPU v5 lite"): ((512, 512, 512), (512, 512, 512)),
    ("splash bf16 1x32768x16x128 window 1024", "TPU v6 lite"): ((512, 512, 512), (1024, 1024, 1024)),
    ("splash bf16 4x4096x16x64 causal", "TPU v5 lite"): ((1024, 1024, 512), (1024, 1024, 1024)),
    ("splash bf16 4x4096x16x64 causal", "TPU v6 lite"): ((1024, 1024, 512), (1024, 1024, 1024)),
}


def one_kernel(fused, window):
    """Whether dq is computed beside dk and dv: best without a window, whose partial dq would be mostly zeros."""
    return window is None if fused is None else fused


def tiles(name, kind, block_q, block_kv, compute):
    """Both passes' tiles: the best, but for what is given."""
    given = (block_q, block_kv, compute)
    return [tuple(new or old for new, old in zip(given, best)) for best in BEST.get((name, kind or ""), TILES)]


def splash(q, k, v, *, window, name, block_q=None, block_kv=None, compute=None, fused=None):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (rows, columns, inner), backward = tiles(name, dispatch.device_kind(), block_q, block_kv, compute)
    if inner > columns or backward[2] > backward[1]:
        raise NotImplementedError(f"compute {inner} exceeds block_kv {columns}")
    length, heads = q.shape[2], q.shape[1]
    fused = one_kernel(fused, window)
    one = masks.CausalMask((length, length))
    if window is not None:
        one = masks.LocalMask((length, length), (window - 1, 0), 0)
    sizes = kernel.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_kv_compute=inner,
        block_q_dkv=backward[0],
        block_kv_dkv=backward[1],
        block_kv_dkv_compute=backward[2],
        block_q_dq=None if fused else backward[0],
        block_kv_dq=None if fused else backward[1],
        use_fused_bwd_kernel=fused,
    )
    attend = kernel.make_splash_mha_single_device(masks.MultiHeadMask([one] * heads), block_sizes=sizes)
    return jax.vmap(attend)(q, k, v)


def shares(*, name, length, heads, window, block_q=None, block_kv=None, compute=None, fused=None):
    """Of the grid's steps, those whose tile has a visible pair: the grid is as wide as the fullest row (or column)."""
    forward, backward = tiles(name, dispatch.device_kind(), block_q, block_kv, compute)

    def visible(rows, columns):
        first = np.arange(0, length, rows)[:, None]
        left = np.arange(0, length, columns)[None]
        seen = left <= first + rows - 1
        return seen if window is None else seen & (left + columns - 1 > first - window)

    def of_rows(rows, columns, _):
        seen = visible(rows, columns)
        width = seen.sum(1).max()
        return seen.sum() / (len(seen) * width), 1 / width, 1 / width  # the tiles; what begins and ends a row

    fused = one_kernel(fused, window)
    across = visible(*backward[:2])
    tall = len(across) if fused else across.sum(0).max()
    columns = (across.sum() / (across.shape[1] * tall), 1 / (heads * tall), 1 / (heads * tall))
    return {
        "splash_mha_fwd_no_residuals": of_rows(*forward),
        "splash_mha_fwd_residuals": of_rows(*forward),
        "splash_mha_dq_no_residuals": of_rows(*backward),
        "splash_mha_dkv_no_residuals": columns,
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
        shares=functools.partial(shares, name=name, length=length, heads=heads, window=window),
        record=False,
    )


CASES = [
    _case("splash bf16 4x4096x16x128 causal", 4, 4096, 16, 128),
    _case("splash bf16 1x32768x16x128 window 1024", 1, 32768, 16, 128, window=1024),
    _case("splash bf16 4x4096x16x64 causal", 4, 4096, 16, 64),
]
