"""The tree of calls as what a diagram shows: boxes, residuals, frames; alike neighbours stand as one with a count."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from arch.topologies.block import Block, Residual
from arch.topologies.stack import Repeated, Stack
from experiments.drawing.trace import MADE, Call, Shape, closed

Form = Literal["box", "residual", "row", "frame"]
KINDS = {  # of a box, by the registry its component is from
    "embedding": "embedding",
    "position encoding": "positions",
    "mixer": "mixer",
    "channel mixer": "channel mixer",
    "norm": "norm",
    "head": "head",
}
TITLES = {"embedding": "{} embedding", "position encoding": "{} positions", "norm": "{} norm", "head": "{} head"}
OWN = {"scale": "layer scale", "residual_scale": "skip scale", "cls": "CLS token"}


@dataclass
class Node:
    """A box, or what holds boxes: a residual (in order, then added to what came in), a row side by side, a frame."""

    form: Form
    kind: str
    title: str = ""
    detail: str = ""
    path: str = ""
    takes: Shape = ()
    gives: Shape = ()
    params: int = 0  # of one set
    sets: frozenset[str] = frozenset()  # the sets of parameters: paths, with a number where they are stacked
    flops: float = 0.0  # of all calls, one example
    items: list["Node"] = field(default_factory=list)
    repeats: int = 1
    skip: str = ""  # "pre": added at the end; "post": before the last item, a norm
    lanes: tuple[str, ...] = ()
    shared: bool = False  # fewer sets of parameters than runs

    def signature(self) -> tuple:
        """Equal for what looks alike: same form, options, shapes; other weights."""
        inner = tuple(item.signature() for item in self.items)
        looks = (self.form, self.kind, self.title, self.detail, self.takes, self.gives, self.params, self.skip)
        return (*looks, self.repeats, self.lanes, inner)

    def boxes(self) -> list["Node"]:
        return [self] if self.form == "box" else [box for item in self.items for box in item.boxes()]

    @property
    def total(self) -> int:
        """Parameters of all boxes within, every set once."""
        return sum(box.params * len(box.sets) for box in self.boxes())


def outline(root: Call) -> list[Node]:
    """The diagram's items from the inputs on."""
    items = fold(_within(root))
    for item in items:
        _mark(item, 1)
    return items


def _mark(node: Node, runs: int, told: bool = False) -> None:
    """Says where weights are shared, at the outermost frame whose boxes all share them, else at the boxes."""
    runs *= node.repeats
    with_params = [box for box in node.boxes() if box.params]
    if node.form in ("box", "frame") and not told and with_params:
        node.shared = told = all(len(box.sets) < runs for box in with_params) and (
            node.form == "box" or _fewer(node, runs)
        )
    for item in node.items:
        _mark(item, runs, told)


def _fewer(frame: Node, runs: int) -> bool:
    """Do all boxes within share as much?"""
    return len({len(box.sets) for box in frame.boxes() if box.params}) == 1


def _nodes(call: Call) -> list[Node]:
    made, kind = call.made, call.kind
    if made is not None and made.what == "topology":
        return _within(call)
    if closed(call):
        trivial = not call.own and not call.flops and call.takes == call.output
        return [] if trivial and (made is None or made.name == "none") else [_box(call)]
    if issubclass(kind, Residual):
        return [_residual(call)]
    if issubclass(kind, Repeated):
        return [_stacked(_within(call), call.module.times)]
    if issubclass(kind, Block):
        return [_frame(call, _block_title(call), _block(call))]
    if _opens(call):
        return [_frame(call, _name(call.path), fold(_within(call)))]
    if not _has_params(call) and call.takes == call.output:
        return []
    return [_box(call)]


def _within(call: Call) -> list[Node]:
    """What a call holds: parameters of its own first, CLS behind the embedding, then its calls in order."""
    items = [node for each in call.within for node in _nodes(each)]
    own = [_own_box(call, name, shape) for name, shape in call.own.items()]
    after = 1 if items and items[0].kind == "embedding" else 0
    if after < len(items):
        for box in own:
            box.gives = items[after].takes
    return items[:after] + own + items[after:]


def _opens(call: Call) -> bool:
    """Is there a block within, or a mixer or channel mixer? Then it is a frame, else one box."""
    return any(
        issubclass(each.kind, Stack | Block | Repeated)
        or (each.made is not None and each.made.what in ("mixer", "channel mixer"))
        or _opens(each)
        for each in call.within
    )


def _has_params(call: Call) -> bool:
    return bool(call.own) or any(_has_params(each) for each in call.within)


def _sizes(call: Call) -> int:
    return sum(map(math.prod, call.own.values())) + sum(map(_sizes, {each.path: each for each in call.within}.values()))


def _box(call: Call) -> Node:
    made = call.made
    if made is None:
        inner = [node.title for each in call.within for node in _nodes(each)]
        linear = call.kind.__module__.startswith("flax.")
        title, detail, kind = _name(call.path), ", ".join(inner), "other"
        if call.takes[1:-1] != call.output[1:-1]:
            kind = "sampling"
        if linear and call.takes:
            detail = f"{call.takes[-1]} to {call.output[-1]}"
    else:
        title, detail, kind = (
            TITLES.get(made.what, "{}").format(made.name.replace("_", " ")),
            made.detail,
            KINDS[made.what],
        )
    size = _sizes(call)
    return Node(
        "box",
        kind,
        title,
        detail,
        call.path,
        call.takes,
        call.output,
        params=size,
        sets=frozenset([call.path]) if size else frozenset(),
        flops=call.flops,
    )


def _own_box(call: Call, name: str, shape: Shape) -> Node:
    path = f"{call.path}/{name}".strip("/")
    return Node(
        "box",
        "other",
        OWN.get(name, name.replace("_", " ").replace("/", " ")),
        path=path,
        params=math.prod(shape),
        sets=frozenset([path]),
    )


def _residual(call: Call) -> Node:
    items = [node for each in call.within for node in _nodes(each)]
    scales = [_own_box(call, name, shape) for name, shape in call.own.items()]
    last = len(items) - 1 if call.module.placement == "post" and items else len(items)
    return Node(
        "residual",
        "residual",
        path=call.path,
        takes=call.takes,
        gives=call.output,
        items=items[:last] + scales + items[last:],
        skip=call.module.placement,
    )


def _block(call: Call) -> list[Node]:
    """Residuals one after the other; in a parallel block the two mixers of the one residual stand side by side."""
    items = _within(call)
    if getattr(call.module, "parallel", False):
        for item in items:
            apart = [inner for inner in item.items if inner.kind in ("mixer", "channel mixer")]
            if item.form == "residual" and len(apart) == 2:
                at = item.items.index(apart[0])
                rest = [inner for inner in item.items if inner not in apart]
                row = Node("row", "row", takes=apart[0].takes, gives=apart[0].gives, items=apart)
                item.items = [*rest[:at], row, *rest[at:]]
    return items


def _block_title(call: Call) -> str:
    made = getattr(getattr(call.module, "mixer", None), MADE, None)
    part = made.part if made is not None else None
    return "block" if part in (None, "mixer") else f"block: {part}"


def _frame(call: Call, title: str, items: list[Node]) -> Node:
    frame = Node("frame", "frame", title, path=call.path, takes=call.takes, gives=call.output, items=items)
    only = items[0] if len(items) == 1 else None
    if only is not None and only.form == "frame" and issubclass(call.kind, Stack):  # one frame for the two
        return replace(only, title=f"{title}: {only.title}", path=call.path)
    return frame


def _stacked(items: list[Node], times: int) -> Node:
    """Blocks whose parameters stand on a leading axis of `times`."""
    for item in items:
        for box in item.boxes():
            box.params //= times
            box.sets = frozenset(f"{path}#{i}" for path in box.sets for i in range(times))
    if len(items) == 1 and items[0].form == "frame":
        return replace(items[0], repeats=items[0].repeats * times)
    first, last = items[0], items[-1]
    return Node("frame", "frame", "pattern", takes=first.takes, gives=last.gives, items=fold(items), repeats=times)


def fold(items: Sequence[Node]) -> list[Node]:
    """Repetitions of neighbours as one with a count, a b a b a b as (a b) x 3, the longest first, then within it.

    Runs of the very same modules, a loop, go before runs of modules that are alike.
    """
    alike = [item.signature() for item in items]
    same = [(mark, *(box.sets for box in item.boxes())) for mark, item in zip(alike, items)]
    title, (covered, start, period) = "loop", _longest(same, items)
    if not covered:
        title, (covered, start, period) = "pattern", _longest(alike, items)
    if not covered:
        return list(items)
    body = [_merged(items[start + i : start + covered : period]) for i in range(period)]
    body = fold(body) if title == "loop" else body
    if len(body) == 1 and body[0].form == "frame" and (title == "pattern" or body[0].repeats == 1):
        folded = replace(body[0], repeats=body[0].repeats * (covered // period))
    else:
        folded = Node("frame", "frame", title, takes=body[0].takes, gives=body[-1].gives, items=fold(body))
        folded.repeats = covered // period
    return [*fold(items[:start]), folded, *fold(items[start + covered :])]


def _longest(marks: Sequence[tuple], items: Sequence[Node]) -> tuple[int, int, int]:
    """(items covered, start, period) of the repetition that covers most; zeros if there is none."""
    best = (0, 0, 0)
    for start in range(len(items)):
        for period in range(1, (len(items) - start) // 2 + 1):
            if all(item.form == "box" for item in items[start : start + period]):
                continue  # single boxes are not worth a frame
            times = 1
            while marks[start : start + period] == marks[start + times * period : start + (times + 1) * period]:
                times += 1
            if times > 1 and times * period > best[0]:
                best = (times * period, start, period)
    return best


def _merged(alike: Sequence[Node]) -> Node:
    """One for several that look alike; their sets of parameters and FLOPs together."""
    return replace(
        alike[0],
        sets=frozenset().union(*(each.sets for each in alike)),
        flops=sum(each.flops for each in alike),
        items=[_merged(column) for column in zip(*(each.items for each in alike))],
    )


def _name(path: str) -> str:
    """topology/stages/0 as "stage 1"."""
    keys = path.split("/")
    if keys[-1].isdigit() and len(keys) > 1:
        return f"{_words(keys[-2]).removesuffix('s')} {int(keys[-1]) + 1}"
    return _words(keys[-1])


def _words(name: str) -> str:
    """A class's or attribute's name as words."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).replace("_", " ").strip().lower()
