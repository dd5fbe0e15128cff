"""What a network is: mixers, channel mixers, norms, positions, topologies, heads, accounting."""

__version__ = "0.1.0"
