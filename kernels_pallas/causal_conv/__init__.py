"""Short causal convolution, every channel by itself; README.md has the derivation."""

from kernels_pallas.causal_conv.api import AUTO, IMPLEMENTATIONS, causal_conv

__all__ = ["AUTO", "IMPLEMENTATIONS", "causal_conv"]
