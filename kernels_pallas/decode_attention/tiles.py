"""Tiles of the TPU kernel, chosen by the static schedule on v5e (scripts/tpu_schedule.py)."""

TILE = 1 << 20
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
