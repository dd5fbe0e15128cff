"""Places an outline: boxes below each other with arrows between, skips at the left, frames around, columns if long.

Every element is measured first and then placed with its centre on the line that the data take.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from experiments.drawing.outline import Node
from experiments.drawing.scene import Box, Circle, Line, Mark, Rect, Scene, Text, width_of
from experiments.drawing.trace import Shape

BACKGROUND, INK, PALE, LINE, FRAME, SHEET = "#ffffff", "#1f2933", "#5c6b7a", "#52606d", "#f7f9fb", "#c3ccd5"
COLOURS = {  # kind: (fill, strong)
    "input": ("#ffffff", "#52606d"),
    "embedding": ("#e3edfd", "#2f63c8"),
    "positions": ("#dff3ef", "#1f8577"),
    "mixer": ("#fde8d3", "#cf6a12"),
    "channel mixer": ("#ece2fa", "#7443bd"),
    "norm": ("#eceff3", "#6b7885"),
    "cross": ("#e0f2f7", "#1b7a94"),
    "sampling": ("#fbf2c6", "#9a7a00"),
    "other": ("#f1ece4", "#85735c"),
    "head": ("#fde2e9", "#bf2c58"),
}
TITLE, DETAIL, LABEL, HEAD = 12.0, 10.5, 10.0, 15.0
PAD, GAP, CLOSE, LANE, HEADER, PLUS, SHEETS = 10.0, 22.0, 13.0, 22.0, 26.0, 7.0, 4.0
LANES_APART = 60.0
ROOM, BROAD = 230.0, 260.0  # a box's options wrap beyond ROOM; no box is stretched beyond BROAD
TALL, HIGH, MARGIN, GUTTER = 1000.0, 420.0, 22.0, 40.0  # a picture's and a frame's height that asks for columns


def si(value: float) -> str:
    """1.05M, 12.6K, 320."""
    for scale, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= scale * 0.9995:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.0f}"


def count(params: int) -> str:
    """As si, with B for 10^9, as one counts parameters."""
    return si(params).replace("G", "B")


def shape_text(shape: Shape) -> str:
    """[B 56×56 64]; a leading axis larger than the one example traced is groups folded into the batch: [16B 49 64]."""
    if not shape:
        return ""
    batch = "B" if shape[0] == 1 else f"{shape[0]}B"
    inner = shape[1:]
    grid = ["×".join(map(str, inner[:-1])), str(inner[-1])] if len(inner) > 2 else list(map(str, inner))
    return f"[{' '.join([batch, *grid])}]"


@dataclass(frozen=True)
class Totals:
    params: int
    flops: float


@dataclass
class Layout:
    totals: Totals
    scene: Scene = field(default_factory=Scene)
    deepest: float = 0.0  # where the longest column ends

    # Measures: (width, height)

    def size(self, node: Node) -> tuple[float, float]:
        if node.form == "box":
            return self._box_size(node)
        if node.form == "row":
            sizes = [self.size(item) for item in node.items]
            w = max(w for w, _ in sizes)
            return len(sizes) * w + (len(sizes) - 1) * PAD, max(h for _, h in sizes) + 2 * CLOSE
        if node.form == "residual":
            w, h = self.flow_size(node.items, CLOSE)
            return w + 2 * LANE, CLOSE + h + CLOSE + 2 * PLUS
        if node.form == "lanes":
            places = self.lane_places(node)
            return sum(self.lane_widths(node)) + LANES_APART * (len(node.lanes) - 1), places[-1][2] + GAP
        w, h = self.columns_size(node.items, HIGH)
        right = count(node.total) + (f"× {node.repeats} shared" if node.repeats > 1 else "")
        header = width_of(node.title, TITLE, True) + width_of(right, DETAIL, True) + 5 * PAD
        top = 0.0 if node.items[0].form == "residual" else CLOSE
        top += 2 * CLOSE if len(self.columns(node.items, HIGH)) > 1 else 0.0
        sheets = SHEETS if node.repeats > 1 else 0.0
        return max(w + 2 * PAD, header) + 2 * sheets, HEADER + top + h + CLOSE + sheets

    def columns(self, items: Sequence[Node], limit: float) -> list[Sequence[Node]]:
        starts = columns([self.size(item)[1] + GAP for item in items], limit)
        return [items[a:b] for a, b in itertools.pairwise([*starts, len(items)])]

    def columns_size(self, items: Sequence[Node], limit: float) -> tuple[float, float]:
        sizes = [self.flow_size(part, GAP) for part in self.columns(items, limit)]
        return sum(w for w, _ in sizes) + GUTTER * (len(sizes) - 1), max(h for _, h in sizes)

    def flow_size(self, items: Sequence[Node], gap: float) -> tuple[float, float]:
        sizes = [self.size(item) for item in items]
        return max((w for w, _ in sizes), default=0.0), sum(h for _, h in sizes) + self._gaps(items, gap)

    def _gaps(self, items: Sequence[Node], gap: float) -> float:
        return sum(self._gap(above, below, gap) for above, below in itertools.pairwise(items))

    def _gap(self, above: Node, below: Node, gap: float) -> float:
        if gap == CLOSE:
            return CLOSE
        if above.form == "lanes" or below.form == "lanes":
            return CLOSE
        if below.form == "residual":
            return 0.0 if above.form == "residual" else CLOSE
        return GAP

    def _box_size(self, node: Node) -> tuple[float, float]:
        lines = self.lines(node)
        left = max([width_of(node.title, TITLE, True), *(width_of(line, DETAIL) for line in lines)])
        right = max(width_of(text, DETAIL) for text in (self.params_text(node), self.share_text(node)))
        tall = 26.0 if not lines and not self.share_text(node) else 25.0 + 14.0 * max(len(lines), 1)
        return left + right + 3.4 * PAD, tall

    def lines(self, node: Node) -> list[str]:
        return wrapped(", ".join(filter(None, ["shared weights" if node.shared else "", node.detail])))

    def params_text(self, node: Node) -> str:
        return count(node.params) if node.params else ""

    def share_text(self, node: Node) -> str:
        share = node.flops / self.totals.flops if self.totals.flops else 0.0
        return f"{share:.0%}" if share >= 0.005 else ""

    # Places: each gets the centre, the top and the width, and returns nothing

    def place(self, node: Node, cx: float, y: float, w: float, times: int = 1) -> None:
        {"box": self._box, "row": self._row, "residual": self._residual, "frame": self._frame, "lanes": self._lanes}[
            node.form
        ](node, cx, y, w, times)

    def flow(self, items: Sequence[Node], cx: float, y: float, w: float, gap: float, times: int) -> float:
        """Items from y downwards, with arrows; where the last one ends."""
        shown = items[0].takes if items else ()
        for above, item in itertools.zip_longest([None, *items[:-1]], items):
            if above is not None:
                space = self._gap(above, item, gap)
                gives = above.gives or shown
                label = shape_text(gives) if gap != CLOSE and gives != shown and space > CLOSE else ""
                shown = gives
                self.arrow(cx, y, y + space, item, label)
                y += space
            self.place(item, cx, y, w if item.form != "box" else min(w, max(self.size(item)[0], BROAD)), times)
            y += self.size(item)[1]
        return y

    def arrow(self, x: float, y0: float, y1: float, into: Node | None, label: str = "") -> None:
        if y1 > y0:
            self.scene.marks.append(
                Line(((x, y0), (x, y1)), LINE, arrow=into is not None and into.form in ("box", "frame"))
            )
        if label:
            self.scene.marks.append(Text(x + 7, (y0 + y1) / 2 + 3, label, LABEL, PALE))

    def _box(self, node: Node, cx: float, y: float, w: float, times: int) -> None:
        fill, strong = COLOURS[node.kind]
        x, h = cx - w / 2, self._box_size(node)[1]
        rect = Rect(x, y, w, h, fill, strong, 4.0, 0.8)
        top, right = y + 17.0, x + w - 0.9 * PAD
        marks: list[Mark] = [Text(x + PAD, top, node.title, TITLE, INK, True)]
        marks += [Text(x + PAD, top + 14 * i, line, DETAIL, PALE) for i, line in enumerate(self.lines(node), 1)]
        if node.params:
            marks.append(Text(right, top, self.params_text(node), DETAIL, INK, anchor="end"))
        if text := self.share_text(node):
            marks.append(Text(right, top + 14, text, DETAIL, strong, anchor="end"))
            share = node.flops / self.totals.flops
            marks.append(Rect(x + 1.5, y + h - 4.0, max((w - 3.0) * share, 1.0), 2.5, strong, radius=1.0))
        about = f"{node.path}: {node.params:,} parameters" + (f" x {len(node.sets)}" if len(node.sets) > 1 else "")
        if node.params and len(node.sets) < times:
            about += f", {len(node.sets)} for {times} runs"
        about += f"; {node.flops:.4g} FLOPs in all"
        self.scene.boxes.append(
            Box(rect, tuple(marks), node.kind, node.path, node.params, len(node.sets), node.flops, about)
        )

    def _row(self, node: Node, cx: float, y: float, w: float, times: int) -> None:
        n = len(node.items)
        each, tall = (w - (n - 1) * PAD) / n, max(self.size(item)[1] for item in node.items)
        ends = y + tall + 2 * CLOSE
        for i, item in enumerate(node.items):
            x, h = cx - w / 2 + each / 2 + i * (each + PAD), self.size(item)[1]
            self.scene.marks.append(Line(((cx, y), (cx, y + 4), (x, y + 4), (x, y + CLOSE)), LINE, arrow=True))
            self.scene.marks.append(Line(((x, y + CLOSE + h), (x, ends - 4), (cx, ends - 4), (cx, ends)), LINE))
            self.place(item, x, y + CLOSE, each, times)

    def _residual(self, node: Node, cx: float, y: float, w: float, times: int) -> None:
        inner, lane = w - 2 * LANE, cx - w / 2 + 0.45 * LANE
        last = len(node.items) - 1 if node.skip == "post" else len(node.items)
        first, behind = node.items[:last], node.items[last:]
        self.arrow(cx, y, y + CLOSE, first[0] if first else None)
        end = self.flow(first, cx, y + CLOSE, inner, CLOSE, times)
        plus = end + CLOSE + PLUS
        self.scene.marks.append(Line(((cx, end), (cx, plus - PLUS)), LINE, arrow=True))
        skip = ((cx, y + 4), (lane, y + 4), (lane, plus), (cx - PLUS, plus))
        self.scene.marks.append(Line(skip, LINE, arrow=True))
        self.scene.marks += [
            Circle(cx, plus, PLUS, BACKGROUND, LINE),
            Line(((cx - 4, plus), (cx + 4, plus)), LINE),
            Line(((cx, plus - 4), (cx, plus + 4)), LINE),
        ]
        if behind:
            self.arrow(cx, plus + PLUS, plus + PLUS + CLOSE, behind[0])
            self.flow(behind, cx, plus + PLUS + CLOSE, inner, CLOSE, times)

    def _frame(self, node: Node, cx: float, y: float, w: float, times: int) -> None:
        h = self.size(node)[1]
        times *= node.repeats
        if node.repeats > 1:
            w, h = w - 2 * SHEETS, h - SHEETS
        x = cx - w / 2
        if node.repeats > 1:
            self.scene.under.append(Rect(x + SHEETS, y + SHEETS, w, h, FRAME, SHEET, 6.0))
        rect = Rect(x, y, w, h, FRAME, SHEET, 6.0)
        self.scene.under.append(rect)
        self.scene.frames.append(rect)
        self.scene.marks.append(Text(x + PAD, y + 17, node.title, TITLE, PALE, True))
        edge = x + w - PAD
        if node.repeats > 1:
            text = f"× {node.repeats}"
            if node.shared:
                text += " shared"
            wide = width_of(text, DETAIL, True) + 12
            self.scene.marks.append(Rect(edge - wide, y + 6, wide, 16, PALE, radius=8.0))
            self.scene.marks.append(Text(edge - wide / 2, y + 17.5, text, DETAIL, BACKGROUND, True, "middle"))
            edge -= wide + 7
        if node.total:
            self.scene.marks.append(Text(edge, y + 17, count(node.total), DETAIL, PALE, anchor="end"))
        start, residual = y + HEADER, node.items[0].form == "residual"
        bottom, marks = y + self.size(node)[1], self.scene.marks
        if len(self.columns(node.items, HIGH)) == 1:
            self.arrow(cx, start - 2, start if residual else start + CLOSE, node.items[0])
            end = self.flow(node.items, cx, start if residual else start + CLOSE, w - 2 * PAD, GAP, times)
            self.arrow(cx, end, bottom, None)
            return
        left = cx - self.columns_size(node.items, HIGH)[0] / 2
        first, last, end = self.side_by_side(node.items, left, start + 2 * CLOSE, HIGH, times)
        head = node.items[0].form in ("box", "frame")
        marks.append(Line(((cx, start - 2), (cx, start), (first, start), (first, start + 2 * CLOSE)), LINE, arrow=head))
        turn = bottom - 5 - (SHEETS if node.repeats > 1 else 0.0)
        marks.append(Line(((last, end), (last, turn), (cx, turn), (cx, bottom)), LINE))

    def lane_widths(self, node: Node) -> list[float]:
        return [
            max((self.size(item)[0] for item in node.items if item.lanes[-1] == lane), default=0.0)
            for lane in node.lanes
        ]

    def lane_places(self, node: Node) -> list[tuple[Node, float, float]]:
        """(item, top, bottom) from the lanes' own top: below all that it takes part in."""
        ends = dict.fromkeys(node.lanes, HEADER - GAP + 6)
        found = []
        for item in node.items:
            top = max(ends[lane] for lane in item.lanes) + GAP
            bottom = top + self.size(item)[1]
            found.append((item, top, bottom))
            for lane in item.lanes:
                ends[lane] = bottom
            if len(item.lanes) > 1:  # what is read stays free to go on beside the box
                ends[item.lanes[0]] = top + 6
        return found

    def _lanes(self, node: Node, cx: float, y: float, w: float, times: int) -> None:
        widths = self.lane_widths(node)
        left = cx - (sum(widths) + LANES_APART * (len(widths) - 1)) / 2
        starts = [left + sum(widths[:i]) + LANES_APART * i for i in range(len(widths))]
        centre = {lane: x + wide / 2 for lane, x, wide in zip(node.lanes, starts, widths)}
        wide_of, marks = dict(zip(node.lanes, widths)), self.scene.marks
        entry = next(item.lanes[-1] for item in node.items if item.takes)
        ends: dict[str, float] = {entry: y}
        marks.append(Line(((cx, y - 2), (cx, y), (centre[entry], y)), LINE))
        for lane in node.lanes:
            marks.append(Text(centre[lane] + 7, y + 16, lane, TITLE, PALE, True))
        for item, top, bottom in self.lane_places(node):
            lane = item.lanes[-1]
            x = centre[lane]
            if lane in ends:
                self.arrow(x, ends[lane], y + top, item, shape_text(item.takes))
            self.place(item, x, y + top, min(wide_of[lane], max(self.size(item)[0], BROAD)), times)
            if len(item.lanes) > 1:
                source, at = item.lanes[0], y + (top + bottom) / 2
                side = x + math.copysign(min(wide_of[lane], max(self.size(item)[0], BROAD)) / 2, centre[source] - x)
                marks.append(Line(((centre[source], ends[source]), (centre[source], at), (side, at)), LINE, arrow=True))
                ends[source] = at
            ends[lane] = y + bottom
        last = node.items[-1].lanes[-1]
        bottom = y + self.size(node)[1]
        marks.append(
            Line(((centre[last], ends[last]), (centre[last], bottom - 4), (cx, bottom - 4), (cx, bottom)), LINE)
        )

    def side_by_side(
        self, items: Sequence[Node], left: float, top: float, limit: float, times: int
    ) -> tuple[float, float, float]:
        """Columns, each entered from above; the centres of the first and the last, and where the last one ends."""
        centres: list[float] = []
        end, x = top, left
        for part in self.columns(items, limit):
            w = self.flow_size(part, GAP)[0]
            cx = x + w / 2
            if centres:
                low, high, gutter = end + 9, top - 14, x - GUTTER / 2
                turn = ((centres[-1], end), (centres[-1], low), (gutter, low), (gutter, high), (cx, high), (cx, top))
                self.scene.marks.append(Line(turn, LINE, arrow=part[0].form in ("box", "frame")))
                if limit == TALL:
                    self.scene.marks.append(Text(cx + 7, top - 4, shape_text(part[0].takes), LABEL, PALE))
            end = self.flow(part, cx, top, w, GAP, times)
            self.deepest = max(self.deepest, end)
            centres.append(cx)
            x += w + GUTTER
        return centres[0], centres[-1], end


def wrapped(text: str) -> list[str]:
    """Options on as many lines as ROOM asks for."""
    lines: list[str] = []
    for item in filter(None, text.split(", ")):
        if lines and width_of(f"{lines[-1]}, {item}", DETAIL) <= ROOM:
            lines[-1] += f", {item}"
        else:
            lines.append(item)
    return lines


def columns(heights: Sequence[float], limit: float) -> list[int]:
    """Where each column starts. A column more is taken where the highest is too tall and loses a quarter by it."""

    def highest(starts: list[int]) -> float:
        return max(sum(heights[a:b]) for a, b in itertools.pairwise([*starts, len(heights)]))

    best = [0]
    for count in range(2, min(5, len(heights)) + 1):
        cuts = ([0, *cut] for cut in itertools.combinations(range(1, len(heights)), count - 1))
        found = min(cuts, key=highest)
        if highest(best) > limit and highest(found) < 0.75 * highest(best):
            best = found
    return best


def lay_out(items: Sequence[Node], title: str, subtitle: str, totals: Totals) -> Scene:
    layout = Layout(totals)
    scene, top = layout.scene, MARGIN + 52.0
    w, _ = layout.columns_size(items, TALL)
    right = MARGIN + max(w, width_of(title, HEAD, True), width_of(subtitle, DETAIL))
    layout.side_by_side(items, (MARGIN + right - w) / 2, top, TALL, 1)
    scene.marks += [
        Text(MARGIN, MARGIN + 10, title, HEAD, INK, True),
        Text(MARGIN, MARGIN + 28, subtitle, DETAIL, PALE),
    ]
    scene.flops = totals.flops
    bottom = _legend(scene, layout.deepest + 22, right)
    scene.w, scene.h = math.ceil(right + MARGIN), math.ceil(bottom + MARGIN - 6)
    return scene


def _legend(scene: Scene, y: float, right: float) -> float:
    """The colours in use, and what the numbers at the right of a box are; where it ends."""
    words = [(kind, kind) for kind in COLOURS if kind != "input" and any(box.kind == kind for box in scene.boxes)]
    words.append(("", "right: parameters of one copy, share of all FLOPs"))
    x = MARGIN
    for kind, text in words:
        wide = (16 if kind else 0) + width_of(text, LABEL) + 14
        if x > MARGIN and x + wide > right + 14:
            x, y = MARGIN, y + 16
        if kind:
            fill, strong = COLOURS[kind]
            scene.marks.append(Rect(x, y, 11, 11, fill, strong, 2.5, 0.8))
        scene.marks.append(Text(x + (16 if kind else 0), y + 9.5, text, LABEL, PALE))
        x += wide
    return y + 16
