"""Topologies, one a file; importing this package fills TOPOLOGIES."""

from arch.topologies import metaformer

__all__ = ["metaformer"]
