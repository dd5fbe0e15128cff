"""Softmax and sigmoid attention; README.md has the derivation."""

from kernels_pallas.attention.api import AUTO, IMPLEMENTATIONS, attention

__all__ = ["AUTO", "IMPLEMENTATIONS", "attention"]
