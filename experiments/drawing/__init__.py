"""Diagrams of models, drawn from the built module: `trace` runs it on shapes, `outline` folds, `layout` places.

    python -m experiments.plan --config=configs/quickstart.py:hybrid --draw hybrid.svg

Nothing in a diagram is typed by hand: boxes are the calls of one traced forward pass in their order, with the shapes
that went through them, the parameters that lie under their paths and the FLOPs that were counted inside.
"""

from experiments.drawing.draw import FORMATS, draw, picture

__all__ = ["FORMATS", "draw", "picture"]
