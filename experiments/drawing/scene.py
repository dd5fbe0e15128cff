"""What is drawn: rectangles, lines, circles and text, with a writer for SVG and one for pictures."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import escape, quoteattr

FONT = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
NARROW, SLIM, WIDE = "ijl.,:;|'!", "()[]frtI1 -/", "mwMW%@+"  # widths of DejaVu Sans, the widest of FONT, in em


def width_of(text: str, size: float, bold: bool = False) -> float:
    """No font of FONT sets the text wider."""
    units = sum(0.34 if c in NARROW else 0.46 if c in SLIM else 0.98 if c in WIDE else 0.66 for c in text)
    return size * units * (1.1 if bold else 1.0)


@dataclass(frozen=True)
class Rect:
    x: float
    y: float
    w: float
    h: float
    fill: str
    stroke: str = "none"
    radius: float = 0.0
    thick: float = 1.0


@dataclass(frozen=True)
class Line:
    points: tuple[tuple[float, float], ...]
    stroke: str
    arrow: bool = False
    thick: float = 1.3


@dataclass(frozen=True)
class Circle:
    x: float
    y: float
    r: float
    fill: str
    stroke: str


@dataclass(frozen=True)
class Text:
    x: float
    y: float  # of the base line
    text: str
    size: float
    fill: str
    bold: bool = False
    anchor: Literal["start", "middle", "end"] = "start"

    @property
    def left(self) -> float:
        return (
            self.x - width_of(self.text, self.size, self.bold) * {"start": 0.0, "middle": 0.5, "end": 1.0}[self.anchor]
        )

    @property
    def right(self) -> float:
        return self.left + width_of(self.text, self.size, self.bold)


Mark = Rect | Line | Circle | Text


@dataclass(frozen=True)
class Box:
    """A box of the diagram as it stands there: its place, what is written in it, what it stands for."""

    rect: Rect
    marks: tuple[Mark, ...]
    kind: str
    path: str
    params: int  # of one set
    copies: int  # sets of parameters
    flops: float
    about: str  # shown by a browser on hovering


@dataclass
class Scene:
    w: float = 0.0
    h: float = 0.0
    flops: float = 0.0  # of the model, forward, one example
    under: list[Mark] = field(default_factory=list)  # frames
    marks: list[Mark] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    frames: list[Rect] = field(default_factory=list)

    def everything(self) -> list[Mark]:
        inside = [mark for box in self.boxes for mark in (box.rect, *box.marks)]
        return [*self.under, *self.marks, *inside]


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _svg(mark: Mark) -> str:
    if isinstance(mark, Rect):
        place = f'x="{_n(mark.x)}" y="{_n(mark.y)}" width="{_n(mark.w)}" height="{_n(mark.h)}" rx="{_n(mark.radius)}"'
        return f'<rect {place} fill="{mark.fill}" stroke="{mark.stroke}" stroke-width="{_n(mark.thick)}"/>'
    if isinstance(mark, Line):
        path = " L".join(f"{_n(x)} {_n(y)}" for x, y in mark.points)
        head = ' marker-end="url(#head)"' if mark.arrow else ""
        style = f'fill="none" stroke="{mark.stroke}" stroke-width="{_n(mark.thick)}" stroke-linejoin="round"'
        return f'<path d="M{path}" {style}{head}/>'
    if isinstance(mark, Circle):
        return (
            f'<circle cx="{_n(mark.x)}" cy="{_n(mark.y)}" r="{_n(mark.r)}" fill="{mark.fill}" stroke="{mark.stroke}"/>'
        )
    weight = ' font-weight="bold"' if mark.bold else ""
    anchor = "" if mark.anchor == "start" else f' text-anchor="{mark.anchor}"'
    place = f'x="{_n(mark.x)}" y="{_n(mark.y)}" font-size="{_n(mark.size)}" fill="{mark.fill}"'
    return f"<text {place}{weight}{anchor}>{escape(mark.text)}</text>"


def svg(scene: Scene, title: str, background: str, line: str) -> str:
    """The scene as SVG text that needs nothing else; its background is its own, so it reads on any page."""
    size = f'width="{_n(scene.w)}" height="{_n(scene.h)}" viewBox="0 0 {_n(scene.w)} {_n(scene.h)}"'
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0 0.8 L7.5 4 L0 7.2 z" fill="{line}"/></marker></defs>'
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{FONT}" role="img">',
        f"<title>{escape(title)}</title>",
        head,
        f'<rect width="100%" height="100%" rx="8" fill="{background}"/>',
        *map(_svg, scene.under),
        *map(_svg, scene.marks),
    ]
    for box in scene.boxes:
        data = f'data-path={quoteattr(box.path)} data-params="{box.params}" data-copies="{box.copies}"'
        inside = "".join(map(_svg, (box.rect, *box.marks)))
        lines.append(
            f'<g class="box" {data} data-flops="{box.flops:.0f}"><title>{escape(box.about)}</title>{inside}</g>'
        )
    return "\n".join([*lines, "</svg>", ""])


def picture(scene: Scene, background: str, file: Path) -> None:
    """The scene through matplotlib, in the format that the file's name ends in."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import patches

    figure = plt.figure(figsize=(scene.w / 72, scene.h / 72), facecolor=background)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, scene.w), ylim=(scene.h, 0))
    axes.axis("off")
    for order, mark in enumerate(scene.everything(), 1):
        _paint(axes, patches, mark, order)
    figure.savefig(file, dpi=144, facecolor=background)
    plt.close(figure)


def _paint(axes: Any, patches: Any, mark: Mark, order: int) -> None:
    if isinstance(mark, Rect):
        style = f"round,pad=0,rounding_size={mark.radius}" if mark.radius else "square,pad=0"
        axes.add_patch(
            patches.FancyBboxPatch(
                (mark.x, mark.y),
                mark.w,
                mark.h,
                boxstyle=style,
                fc=mark.fill,
                ec=mark.stroke,
                lw=mark.thick,
                zorder=order,
            )
        )
    elif isinstance(mark, Line):
        xs, ys = zip(*mark.points)
        last = -1 if mark.arrow else None  # the arrow draws the last stretch
        axes.plot(xs[:last], ys[:last], color=mark.stroke, lw=mark.thick, zorder=order, solid_joinstyle="round")
        if mark.arrow:
            head = {"arrowstyle": "-|>", "color": mark.stroke, "lw": mark.thick, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", xy=mark.points[-1], xytext=mark.points[-2], arrowprops=head, zorder=order)
    elif isinstance(mark, Circle):
        axes.add_patch(patches.Circle((mark.x, mark.y), mark.r, fc=mark.fill, ec=mark.stroke, zorder=order))
    else:
        align = {"start": "left", "middle": "center", "end": "right"}[mark.anchor]
        weight = "bold" if mark.bold else "normal"
        # units of the scene are points, so a size is one of matplotlib's; its font is DejaVu Sans
        axes.text(mark.x, mark.y, mark.text, fontsize=mark.size, color=mark.fill, ha=align, weight=weight, zorder=order)
