"""The plots of a report as SVG text that takes its colours and its font from the page around it.

matplotlib draws with stand-in colours, which become CSS variables: one picture for light and dark. Lines are named at
their ends, not in a legend, and differ in marker as well as in colour.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from experiments.formats import percent, scaled
from experiments.reporting.cells import Cell

SERIES = [f"#a000{n:02x}" for n in range(8)]  # stand-ins: the page defines --s0 .. --s7
INK, FAINT, GRID = "#b00000", "#b00001", "#b00002"
VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)", GRID: "var(--grid)"}
MARKERS = "osD^vP*X"
SIZE = (6.2, 3.7)  # inches, at 72 units each
GAP = 13.0  # units between two labels
ASIDE = 6.0  # units between two models of the same size
RC: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.id": None, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.spines.left": False, "axes.edgecolor": FAINT, "axes.labelcolor": FAINT, "xtick.color": FAINT,
    "ytick.color": FAINT, "text.color": INK, "axes.grid": True, "axes.grid.axis": "y", "grid.color": GRID,
    "grid.linewidth": 0.8, "ytick.left": False, "lines.linewidth": 2.0, "lines.markersize": 5.0, "path.simplify": False,
}  # fmt: skip


def accuracy_over(axis: str, cells: Sequence[Cell]) -> str:
    """Validation accuracy over "steps" or training "seconds": mean of the finished seeds, band from least to most."""
    figure, axes = _axes()
    ends = []
    column = {"steps": 0, "seconds": 1}[axis]
    shown = [cell for cell in cells if cell.curve()]
    longest = max((cell.curve()[-1][1] for cell in shown), default=0.0)
    unit, name = (60.0, "minutes") if axis == "seconds" and longest > 300 else (1.0, axis)
    for cell in shown:
        color, marker = style(cells, cell)
        points = cell.curve()
        x = [point[column] / unit for point in points]
        mean, low, high = ([point[n] for point in points] for n in (2, 3, 4))
        axes.plot(x, mean, color=color, marker=marker, markevery=max(1, len(x) // 6), clip_on=False, zorder=3)
        if len(cell.done) > 1:
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0, zorder=2)
        ends.append((x[-1], mean[-1], cell.label, color))
    axes.set_xlabel("step" if axis == "steps" else f"training {name}, evaluation left out")
    axes.set_xlim(left=0)
    _finish(axes, cells, ends)
    return _svg(figure, f"over-{axis}")


def accuracy_against_parameters(cells: Sequence[Cell]) -> str:
    """Test accuracy with its 95 % interval against the number of parameters."""
    figure, axes = _axes()
    shown = [cell for cell in cells if cell.params is not None and cell.mean is not None]
    sizes = [cell.params or 0 for cell in shown]
    ends = []
    log = bool(sizes) and max(sizes) > 3 * min(sizes)
    if log:
        axes.set_xscale("log")
        axes.set_xlim(min(sizes) / 1.25, max(sizes) * 1.25)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    elif sizes:
        middle = (max(sizes) + min(sizes)) / 2
        half = max(0.6 * (max(sizes) - min(sizes)), 0.1 * middle)
        axes.set_xlim(middle - half, middle + half)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: scaled(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    pixels, data = axes.transData.transform, axes.transData.inverted().transform
    placed: list[float] = []
    for cell in sorted(shown, key=lambda cell: (cell.params or 0, cell.label)):
        assert cell.mean is not None
        assert cell.interval is not None
        color, marker = style(cells, cell)
        place = float(pixels((cell.params or 0, cell.mean))[0])
        while any(abs(place - other) < ASIDE for other in placed):  # models of the same size stand side by side
            place += ASIDE
        placed.append(place)
        x = float(data((place, 0))[0])
        error = [[cell.mean - cell.interval[0]], [cell.interval[1] - cell.mean]]
        axes.errorbar([x], [cell.mean], yerr=error, color=color, marker=marker, capsize=3, elinewidth=1.6, zorder=3)
        ends.append((x, cell.mean, cell.label, color))
    axes.set_xlabel("parameters")
    _finish(axes, cells, ends)
    return _svg(figure, "against-parameters")


def style(cells: Sequence[Cell], cell: Cell) -> tuple[str, str]:
    """Colour and marker of a cell, the same in every plot and in the table."""
    place = series(cells, cell)
    return SERIES[place % len(SERIES)], MARKERS[(place + place // len(SERIES)) % len(MARKERS)]


def series(cells: Sequence[Cell], cell: Cell) -> int:
    return sorted((other.label, other.hash) for other in cells).index((cell.label, cell.hash))


def _axes() -> tuple[Figure, Axes]:
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=SIZE, dpi=72)
        return figure, figure.add_axes((0.085, 0.135, 0.66, 0.83))


def _finish(axes: Axes, cells: Sequence[Cell], ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Accuracy axis, majority-class level, and the names beside the ends, pushed apart where they would touch."""
    levels = sorted({cell.majority for cell in cells if cell.majority is not None})
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    low, high = axes.get_ylim()
    low, high = min([low, *levels]), max([high, *levels])
    axes.set_ylim(max(0.0, low - 0.04 * (high - low)), min(1.0, high + 0.03 * (high - low)))
    labels = [(y, text, color, x) for x, y, text, color in ends]
    right = axes.get_xlim()[1]
    for level in levels:
        axes.axhline(level, color=FAINT, linestyle=(0, (5, 3)), linewidth=1.2, zorder=1)
        labels.append((level, f"majority class {percent(level)}", FAINT, right))
    pixels = axes.transData.transform
    inverse = axes.transData.inverted().transform
    bottom, top = axes.bbox.y0, axes.bbox.y1
    wanted = sorted((float(pixels((right, y))[1]), text, color, x, y) for y, text, color, x in labels)
    places = spread([item[0] for item in wanted], GAP, bottom, top)
    limits = axes.get_xlim(), axes.get_ylim()
    for place, (_, text, color, x, y) in zip(places, wanted, strict=True):
        edge = axes.bbox.x1
        start_x, start_y = inverse((edge + 12, place))
        axes.plot(
            [x, right, inverse((edge + 9, place))[0]], [y, y, start_y],
            color=color, linewidth=0.8, alpha=0.6, clip_on=False, zorder=1, marker="",
        )  # fmt: skip
        axes.text(start_x, start_y, text, color=color, va="center", fontweight="normal" if color == FAINT else "bold")
    axes.set_xlim(limits[0])
    axes.set_ylim(limits[1])


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones (ascending), at least gap apart, inside low..high where they fit."""
    blocks: list[list[float]] = []  # [sum of wanted places of the block's first label, count]
    for index, place in enumerate(wanted):
        blocks.append([place - index * gap, 1.0])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    last = high - gap * (len(wanted) - 1)
    starts = [max(low, min(total / count, last)) for total, count in blocks for _ in range(int(count))]
    return [start + index * gap for index, start in enumerate(starts)]


def _svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element with CSS colours, ids of its own and nothing that changes from run to run."""
    file = io.StringIO()
    with matplotlib.rc_context({**RC, "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", text)
    text = re.sub(r" font-family: [^;\"]*;?", "", text)  # the page's
    for n, color in enumerate(SERIES):
        text = text.replace(color, f"var(--s{n})")
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg height="[^"]*"', r"<svg \1", text, count=1).strip()
