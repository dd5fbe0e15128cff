"""Causal linear attention with optional decay; README.md has the derivation."""

from kernels_pallas.linear_attention.api import AUTO, IMPLEMENTATIONS, linear_attention

__all__ = ["AUTO", "IMPLEMENTATIONS", "linear_attention"]
