"""Comparison of arrays in tests."""

import numpy as np


def rel_rms(got, want) -> float:
    """Relative RMS error of `got`; inf if a shape differs or one is not finite where the other is."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape or not np.array_equal(np.isfinite(got), np.isfinite(want)):
        return float("inf")
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True):
        return float("inf")
    error = np.sqrt(np.mean((got[finite] - want[finite]) ** 2)) if finite.any() else 0.0
    size = np.sqrt(np.mean(want[finite] ** 2)) if finite.any() else 0.0
    return float(error / size) if size else float(error)
