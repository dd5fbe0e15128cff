"""The tree of calls as what a diagram shows: boxes, residuals, frames; alike neighbours stand as one with a count."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from arch.topologies.block import Block, Residual
from arch.topologies.stack import Repeated, Stack
from experiments.drawing.trace import MADE, Call, Shape, closed

Form = Literal["box", "residual", "row", "frame", "lanes"]
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
    """A box, or what holds boxes.

    residual: in order, then added to what came in; row: side by side; frame: in order, `repeats` times; lanes: in
    order, each in its lane, where of two lanes the first is read by the box, which stands in the second.
    """

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
    items = fold(_conditions(_within(root)))
    for item in items:
        _mark(item, 1)
    return items


def _conditions(items: list[Node]) -> list[Node]:
    """Layers of a component that run before it, as those for the time of a diffusion, in one box."""
    merged: list[Node] = []
    for item in items:
        owner, slash, _ = item.path.partition("/")
        if item.form == "box" and slash and owner != "topology" and item.kind == "other":
            before = merged[-1] if merged else None
            if before is not None and before.kind == "other" and before.path == owner and before.form == "box":
                before.title += f", {item.title}"
                before.params, before.flops = before.params + item.params, before.flops + item.flops
                continue
            item = replace(item, path=owner, title=f"{owner}: {item.title}", detail="", takes=(), gives=())
        merged.append(item)
    return merged


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
        items = _within(call)
        return _laned(items, call.module.diagram()) if hasattr(call.module, "diagram") else items
    if closed(call):
        trivial = not call.own and not call.flops and call.takes == call.output
        return [] if trivial and (made is None or made.name == "none") else [_box(call)]
    if issubclass(kind, Residual):
        return [_residual(call)]
    if issubclass(kind, Repeated):
        return _within(call)
    if issubclass(kind, Block):
        return [_frame(call, _block_title(call), _block(call))]
    if _opens(call):
        return [_frame(call, _name(call.path), fold(_within(call)))]
    if not _has_params(call) and call.takes == call.output:
        return []
    return [_box(call)]


def _within(call: Call) -> list[Node]:
    """What a call holds: parameters of its own first, CLS behind the embedding, then its calls in order.

    Calls within a scan stand in a frame with its trip count.
    """
    items: list[Node] = []
    for runs, calls in itertools.groupby(call.within, key=lambda each: each.runs):
        inner = [node for each in calls for node in _nodes(each)]
        items += _repeated(inner, runs // call.runs) if runs > call.runs and inner else inner
    own = [_own_box(call, name, shape) for name, shape in call.own.items()]
    after = 1 if items and items[0].kind == "embedding" else 0
    if after < len(items):
        for box in own:
            box.gives = box.gives or items[after].takes
    return items[:after] + own + items[after:]


def _laned(items: list[Node], diagram: Mapping[str, Any]) -> list[Node]:
    """The items that a topology's `diagram` puts in lanes as one node; docs/structure.md has the contract."""
    of, titles = diagram["of"], diagram.get("titles", {})

    def name(item: Node) -> str:
        return item.path.rpartition("/")[2]

    placed = [i for i, item in enumerate(items) if name(item) in of]
    if not placed:
        return items
    first, last = placed[0], placed[-1] + 1
    for item in items[first:last]:
        where = of[name(item)]
        item.lanes = (where,) if isinstance(where, str) else tuple(where)
        item.title = titles.get(name(item), item.title)
    lanes = Node("lanes", "lanes", items=items[first:last], lanes=tuple(diagram["lanes"]))
    home = [item for item in lanes.items if item.lanes[-1] == items[last - 1].lanes[-1]]
    lanes.takes, lanes.gives = lanes.items[0].takes, home[-1].gives
    return [*items[:first], lanes, *items[last:]]


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


def _sizes(call: Call) -> tuple[int, int]:
    """Parameters of one set, and sets: within a scan a module has a part of what the model holds for it."""
    outer, inner, copies = 0, 0, 1
    for each in {each.path: each for each in [call, *_all(call)]}.values():
        for name, shape in each.own.items():
            mine = math.prod(each.inner.get(name, shape))
            outer, inner = outer + math.prod(shape), inner + mine
            copies = max(copies, math.prod(shape) // max(mine, 1))
    return inner, copies


def _all(call: Call) -> list[Call]:
    return [inner for each in call.within for inner in [each, *_all(each)]]


def _sets(path: str, size: int, copies: int) -> frozenset[str]:
    if not size:
        return frozenset()
    return frozenset([path] if copies == 1 else (f"{path}#{i}" for i in range(copies)))


def _box(call: Call) -> Node:
    made = call.made
    if made is None:
        inner = [node.title for each in call.within for node in _nodes(each)]
        title, detail, kind = _name(call.path), ", ".join(inner), "other"
        if len(call.inputs) > 1:
            kind, detail = "cross", f"{call.module.heads} heads" if hasattr(call.module, "heads") else detail
        elif call.takes[1:-1] != call.output[1:-1]:
            kind = "sampling"
        if call.kind.__module__.startswith("flax.") and call.takes:
            detail = f"{call.takes[-1]} to {call.output[-1]}"
    else:
        title, detail, kind = (
            TITLES.get(made.what, "{}").format(made.name.replace("_", " ")),
            made.detail,
            KINDS[made.what],
        )
    size, copies = _sizes(call)
    return Node(
        "box",
        kind,
        title,
        detail,
        call.path,
        call.takes,
        call.output,
        params=size,
        sets=_sets(call.path, size, copies),
        flops=call.flops,
    )


def _own_box(call: Call, name: str, shape: Shape) -> Node:
    path = f"{call.path}/{name}".strip("/")
    size = math.prod(call.inner.get(name, shape))
    return Node(
        "box",
        "other",
        OWN.get(name, name.replace("_", " ").replace("/", " ")),
        path=path,
        gives=(1, *shape) if len(shape) > 1 else (),
        params=size,
        sets=_sets(path, size, math.prod(shape) // max(size, 1)),
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
        inner = only.title.removeprefix("block: ")
        return replace(only, title=title if inner == title else f"{title}: {inner}", path=call.path)
    return frame


def _repeated(items: list[Node], times: int) -> list[Node]:
    """The body of a scan."""
    if len(items) == 1 and items[0].form == "frame":
        return [replace(items[0], repeats=items[0].repeats * times)]
    first, last = items[0], items[-1]
    return [Node("frame", "frame", "pattern", takes=first.takes, gives=last.gives, items=fold(items), repeats=times)]


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
