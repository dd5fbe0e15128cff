"""Token mixers, one a file; importing this package fills MIXERS."""

from arch.mixers import fourier, linear, pooling, softmax

__all__ = ["fourier", "linear", "pooling", "softmax"]
