"""Attention maps as PNG: a grid of heads, layer after layer; and heads against tokens for the row that is read.

On white whatever the page around them, so that axes and words stay readable in a dark one.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

ACROSS = 8  # heads side by side
FEW = 24  # tokens that are written out along the axes
POINTS = 256  # pixels a side of a map at most: longer ones are means over blocks
WARM = LinearSegmentedColormap.from_list("warm", ["#ffffff", "#fdd49e", "#fc8d59", "#b30000", "#4a0000"])
SIGNED = "RdBu_r"
RC: dict[Any, Any] = {"font.size": 8, "axes.titlesize": 8, "axes.linewidth": 0.5, "text.parse_math": False}


def scale(values: np.ndarray) -> tuple[Any, Any]:
    """(colour map, norm): from white at 0, about 0 where there are negative weights.

    Of many values the largest 1 in 1000 all get the darkest colour, so that single ones do not bleach the rest.
    """
    size = np.abs(values).ravel()
    highest = float(size.max() if size.size < 10_000 else np.quantile(size, 0.999)) or 1.0
    if values.min() < -1e-6 * highest:
        return SIGNED, TwoSlopeNorm(0.0, -highest, highest)
    return WARM, Normalize(0.0, highest)


def _bar(figure: Figure, box: tuple[float, float, float, float], image: Any) -> None:
    beyond = "max" if float(image.get_array().max()) > image.norm.vmax else "neither"
    figure.colorbar(image, cax=figure.add_axes(box), extend=beyond).ax.tick_params(length=2, width=0.5)


def thin(map_: np.ndarray) -> np.ndarray:
    """[T S] with sides of at most POINTS: means over blocks of equal size, a shorter one at the end."""
    for axis in (0, 1):
        size = -(-map_.shape[axis] // POINTS)
        starts = np.arange(0, map_.shape[axis], size)
        counts = np.diff([*starts, map_.shape[axis]])
        map_ = np.add.reduceat(map_, starts, axis) / np.expand_dims(counts, 1 - axis)
    return map_


def shown(token: str) -> str:
    """A token on an axis: spaces and line ends made visible."""
    bare = token.strip(" ")
    return {"": "␣", "\n": "↵"}.get(bare, bare[:10])


def heads(file: Path, layers: Sequence[tuple[str, np.ndarray]], tokens: Sequence[str], title: str) -> None:
    """layers: (name, weights [H T S]). Each layer has a colour scale of its own, in the bar beside it."""
    with matplotlib.rc_context(RC):
        lines = [math.ceil(len(weights) / ACROSS) for _, weights in layers]
        across = min(ACROSS, max(len(weights) for _, weights in layers))
        few = len(tokens) <= FEW
        side = max(1.3, 0.13 * len(tokens)) if few else 1.5  # inches
        labels = 0.15 + 0.07 * max(len(shown(t)) for t in tokens) if few else 0.3  # inches that the ticks' words take
        margin = 0.4 + labels
        size = margin + across * (side + 0.14) + 0.7, 0.6 + sum(lines) * (side + 0.3) + len(lines) * (0.2 + labels)
        figure = Figure(figsize=size)
        figure.suptitle(title, x=margin / size[0], ha="left", y=1 - 0.12 / size[1], va="top", fontsize=10)
        top = size[1] - 0.55
        for (name, weights), count in zip(layers, lines):
            squares = np.stack([thin(head) for head in weights])
            colours, norm = scale(squares)
            figure.text(margin / size[0], (top - 0.05) / size[1], name, ha="left", va="top", weight="bold")
            top -= 0.2
            first = top
            for row in range(count):
                top -= side + 0.3
                for column in range(across):
                    head = row * ACROSS + column
                    if head >= len(weights):
                        break
                    box = (margin + column * (side + 0.14)) / size[0], top / size[1], side / size[0], side / size[1]
                    axes = figure.add_axes(box)
                    extent = (-0.5, weights.shape[2] - 0.5, weights.shape[1] - 0.5, -0.5)
                    image = axes.imshow(squares[head], cmap=colours, norm=norm, extent=extent, interpolation="nearest")
                    axes.set_title(f"head {head + 1}", pad=2)
                    lowest = head + ACROSS >= len(weights)
                    _axis(axes.xaxis, tokens, few, lowest)
                    _axis(axes.yaxis, tokens, few, column == 0)
                    axes.tick_params(axis="x", rotation=90 if few else 0)
            tall = min(first - top - 0.3, 2.5)
            corner = (margin + across * (side + 0.14)) / size[0], (first - 0.28 - tall) / size[1]
            _bar(figure, (*corner, 0.1 / size[0], tall / size[1]), image)
            top -= labels
        figure.savefig(file, dpi=110, facecolor="white")


def _axis(axis: Any, tokens: Sequence[str], few: bool, labelled: bool) -> None:
    if few:
        axis.set_ticks(range(len(tokens)), [shown(t) for t in tokens] if labelled else [], fontsize=6.5)
    else:
        axis.set_ticks([0, len(tokens) // 2], None if labelled else ["", ""])
    axis.set_tick_params(length=2, width=0.5)


def rows(file: Path, layers: Sequence[tuple[str, np.ndarray]], tokens: Sequence[str], title: str) -> None:
    """layers: (name, [H S]), the row of each head that is read: heads down, tokens along."""
    with matplotlib.rc_context(RC):
        few = len(tokens) <= 4 * FEW
        wide = max(5.0, 0.13 * len(tokens)) if few else 10.0
        tall = [max(0.6, 0.13 * len(row)) for _, row in layers]
        below = 0.15 + 0.07 * max(len(shown(t)) for t in tokens) if few else 0.45
        size = wide + 1.6, 0.45 + sum(tall) + 0.5 * len(layers) - 0.15 + below
        figure = Figure(figsize=size)
        figure.suptitle(title, x=0.7 / size[0], ha="left", y=1 - 0.12 / size[1], va="top", fontsize=10)
        top = size[1] - 0.45
        for n, ((name, weights), height) in enumerate(zip(layers, tall)):
            top -= 0.35 + height
            axes = figure.add_axes((0.7 / size[0], top / size[1], wide / size[0], height / size[1]))
            colours, norm = scale(weights)
            extent = (-0.5, weights.shape[1] - 0.5, len(weights) + 0.5, 0.5)
            image = axes.imshow(weights, cmap=colours, norm=norm, extent=extent, aspect="auto", interpolation="nearest")
            axes.set_title(name, loc="left", weight="bold", pad=3)
            axes.set_ylabel("head")
            axes.set_yticks(range(1, len(weights) + 1, -(-len(weights) // 12)))
            last = n == len(layers) - 1
            if few:
                axes.set_xticks(
                    range(len(tokens)), [shown(t) for t in tokens] if last else [], fontsize=6.5, rotation=90
                )
            elif last:
                axes.set_xlabel("token")
            else:
                axes.set_xticklabels([])
            axes.tick_params(length=2, width=0.5)
            _bar(figure, ((0.8 + wide) / size[0], top / size[1], 0.1 / size[0], height / size[1]), image)
            top -= 0.15
        figure.savefig(file, dpi=110, facecolor="white")
