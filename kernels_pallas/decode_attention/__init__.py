"""Attention of one new token to a cache of keys and values; README.md has the derivation."""

from kernels_pallas.decode_attention.api import AUTO, IMPLEMENTATIONS, decode_attention

__all__ = ["AUTO", "IMPLEMENTATIONS", "decode_attention"]
