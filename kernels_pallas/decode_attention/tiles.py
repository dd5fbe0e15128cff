"""Tiles of the TPU kernel, by scripts/tune_kernel.py decode_attention (results/kernels/tune.jsonl).

Bundles a key and key head at 128, 256, 512, 1024, 2048 keys a step, bfloat16, 32 heads, 8 key heads of 128: v5e 0.95,
0.71, 0.62, 0.54, 0.52, v6e 0.88, 0.69, 0.56, 0.49, 0.45, where the bytes take 0.94 and 0.55 cycles. So 512 do; with a
window, whose ends are read in whole tiles, more cost: 0.71, 0.69, 0.79 at 512, 1024, 2048 and window 4096 (v5e).
"""

TILE = 1 << 20  # bytes of keys a grid step: 512 of the case above
MOST = 2048  # keys a grid step
ROWS = 16  # keys are cut in multiples of this, the sublanes of a bfloat16 tile
TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")  # devices whose two cores share the parallel axes of a grid


def keys_per_step(keys: int, bytes_per_key: int) -> int:
    """Keys a grid step."""
    most = min(MOST, max(128, TILE // bytes_per_key // 128 * 128))
    return keys if keys <= most else most


def splits(batch: int, steps: int, device_kind: str | None) -> int:
    """Parts of the cache that may run on different cores."""
    return 2 if device_kind in TWO_CORES and batch % 2 and steps > 1 else 1
