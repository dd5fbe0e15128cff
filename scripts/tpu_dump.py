"""Reads the TPU compiler's dump of a kernel: the cycles of its schedule, the use of its units, spills and fills.

The compiler writes the final program, one VLIW bundle a line, where a bundle issues in one cycle. Each loop ends with a
test that holds its trip count; the outermost loop of a kernel runs over its grid (or, on a chip of two cores that share
the grid, over one core's part) in GRID_EXTRA more turns, which only start and await copies. A bundle counts as often
as the loops around it turn. That is a lower bound on time: it leaves out every wait for memory.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

GRID_EXTRA = 2  # turns by which the loop over a grid exceeds it: the pipeline's first and last stage
BIG = 0.02  # of the bundles of the loop over the grid: a predicated region of that size is listed

_BUNDLE = re.compile(r"^ *(?:0x)?(?P<address>[0-9a-f]+) +(?P<marks>[A-Z]{2}(?:,? [A-Z]{2})*)? *: (?P<depth>[> ]*)\{")
_EXIT = re.compile(
    r"%p\d+_p\d+ = scmp\.(?P<test>ge|eq|gt)\.s32\.totalorder %(?P<index>s\d+)_s\d+, (?P<bound>\S+?) /\* loop exit test"
)
_SKIP = re.compile(r"sbr\.rel \((?P<sign>!?)%p\d+_p\d+\) target = \$region(?P<region>\d+)")
_REGION = re.compile(r"(?:Start|Start/End empty) region (\d+)")


@dataclass(frozen=True)
class Loop:
    first: int  # bundles of its body
    last: int
    depth: int
    turns: float | None  # None if they are not a constant of the program
    grid: bool


@dataclass(frozen=True)
class Region:
    """Bundles that a branch may step over: the body of a pl.when."""

    first: int
    last: int
    depth: int


@dataclass(frozen=True)
class Schedule:
    """One kernel's program. cycles is of the whole grid, all else of those cycles."""

    name: str
    whole: int  # bundles of the program, each once
    step: int  # bundles of the loop over the grid, each once; those of the program if there is no loop
    steps: float  # turns of the loop over the grid
    cycles: float
    matrix: float  # share of the slots for matrix products in use
    vector: float  # share of the slots for vector arithmetic in use
    fills: float  # registers read back from memory, a cycle
    spills: float  # registers written to memory for want of room, a cycle
    regions: tuple[int, ...] = field(default=())  # bundles of the big predicated regions, the largest first


def kernels(folder: Path, names: Collection[str]) -> dict[str, list[tuple[Path, Path]]]:
    """The programs and tables of use in a dump of the kernels of these names, in the order they were compiled."""
    found: dict[str, list[tuple[Path, Path]]] = {}
    for program in sorted(folder.glob("*-final_bundles.txt")):
        match = re.match(r"(?P<stem>\d+-(?P<name>.+?)(?:\.\d+)?)-\d+-final_bundles\.txt$", program.name)
        if match is None or match["name"] not in names:
            continue
        (use,) = folder.glob(_escape(match["stem"]) + "-*-final_hlo-static-per-bundle-utilization.txt")
        found.setdefault(match["name"], []).append((program, use))
    return found


def _escape(text: str) -> str:
    return re.sub(r"([\[\]*?])", r"[\1]", text)


def read(name: str, program: Path, use: Path, shares: Sequence[float] = (), turns: Sequence[float] = ()) -> Schedule:
    """The schedule of one kernel.

    Args:
      shares: of the grid's steps that run each of the big predicated regions, the largest first; 1 if not given.
      turns: of the loops whose trip count is not a constant of the program, in its order.
    """
    lines = program.read_text().splitlines()
    depths, marks = _bundles(lines)
    loops = _loops(lines, depths, marks, turns, name)
    grid = next((loop for loop in loops if loop.grid), None)
    start, end = (grid.first, grid.last) if grid else (0, len(depths) - 1)
    step = end - start + 1
    regions = [r for r in _regions(lines, depths) if start <= r.first and r.last <= end]
    big = [r for r in regions if r.last - r.first + 1 >= BIG * step]
    if grid and big:  # the largest is the whole step, which the pipeline leaves out in its extra turns
        whole = max(big, key=lambda r: r.last - r.first)
        big = [r for r in big if r != whole and whole.first <= r.first and r.last <= whole.last]
    big = [r for r in big if not any(o != r and o.first <= r.first and r.last <= o.last for o in big)]
    big.sort(key=lambda r: r.first - r.last)
    weights = [1.0] * len(depths)
    for loop in loops:
        assert loop.turns is not None
        for n in range(loop.first, loop.last + 1):
            weights[n] *= loop.turns
    for share, region in zip(shares, big):
        for n in range(region.first, region.last + 1):
            weights[n] *= share
    columns, capacity, rows = _use(use)
    if len(rows) != len(depths):
        raise ValueError(f"{use.name}: {len(rows)} rows for {len(depths)} bundles")
    cycles = sum(weights)

    def total(column: str) -> float:
        at = columns.index(column)
        return sum(w * row[at] for w, row in zip(weights, rows))

    return Schedule(
        name=name,
        whole=len(depths),
        step=step,
        steps=grid.turns if grid and grid.turns else 1.0,
        cycles=cycles,
        matrix=total("MATMUL") / cycles / capacity[columns.index("MATMUL")],
        vector=total("VALU") / cycles / capacity[columns.index("VALU")],
        fills=total("VLOAD:FILL") / cycles,
        spills=total("VSTORE:SPILL") / cycles,
        regions=tuple(r.last - r.first + 1 for r in big),
    )


def _bundles(lines: list[str]) -> tuple[list[int], dict[int, str]]:
    """Of each bundle: how many loops are around it; and the marks (LB, ...) of those that have any."""
    depths: list[int] = []
    marks: dict[int, str] = {}
    for line in lines:
        match = _BUNDLE.match(line)
        if match:
            if int(match["address"], 16) != len(depths):
                raise ValueError(f"bundle {match['address']} comes after {len(depths)} bundles")
            if match["marks"]:
                marks[len(depths)] = match["marks"]
            empty = line[match.end() :].startswith("}")  # such a bundle is not marked with its depth
            depths.append(depths[-1] if empty and depths else match["depth"].count(">"))
    if not depths:
        raise ValueError("no bundles in the program: the dump's format has changed")
    return depths, marks


def _by_bundle(lines: list[str]) -> list[str]:
    """The text of each bundle; a bundle may go on over further lines."""
    texts: list[str] = []
    for line in lines:
        if _BUNDLE.match(line):
            texts.append(line)
        elif texts:
            texts[-1] += " " + line
    return texts


def _loops(lines: list[str], depths: list[int], marks: dict[int, str], turns: Sequence[float], name: str) -> list[Loop]:
    texts = _by_bundle(lines)
    constants = _constants(texts)
    backs = _backs(texts)
    given = list(turns)
    loops = []
    for first in (n for n, mark in marks.items() if "LB" in mark.split()):
        depth = depths[first]
        last = first
        while (
            last + 1 < len(depths)
            and depths[last + 1] >= depth
            and not (depths[last + 1] == depth and "LB" in marks.get(last + 1, "").split())
        ):
            last += 1
        last = max(last, backs.get(first, last))  # a bundle on the way that acts at the loop's exit has a lesser depth
        tests = [m for n in range(first, last + 1) if depths[n] == depth for m in _EXIT.finditer(texts[n])]
        body = " ".join(texts[n] for n in range(first, last + 1) if depths[n] == depth)
        grid = depth == 1 and ("pipeline-emitter" in body or "iteration index, stage" in body)
        count: float | None = None
        if tests:
            count = _turns(tests[-1], constants, texts)
        if count is not None and grid:
            count -= GRID_EXTRA
        if count is None:
            if not given:
                raise ValueError(f"{name}: the loop at bundle {first:#x} has no constant trip count; give its turns")
            count = given.pop(0)
        loops.append(Loop(first, last, depth, count, grid))
    return loops


def _backs(texts: list[str]) -> dict[int, int]:
    """Of the first bundle of each loop: the bundle whose branch goes back to it."""
    starts = {region: n for n, text in enumerate(texts) for region in _REGION.findall(text)}
    found = {}
    for n, text in enumerate(texts):
        for match in _SKIP.finditer(text):
            target = starts.get(match["region"])
            if target is not None and target <= n:
                found[target] = n
    return found


def _constants(texts: list[str]) -> dict[str, int]:
    """Scalars that are set to a number, by their name in single assignment form (the part before the underscore)."""
    found: dict[str, int] = {}
    for text in texts:
        for name, value in re.findall(r"%(s\d+)_s\d+ = smov\.u32 (\d+)(?: |$)", text):
            found[name] = int(value) - (1 << 32 if int(value) >= 1 << 31 else 0)
    return found


def _turns(test: re.Match[str], constants: dict[str, int], texts: list[str]) -> float | None:
    """How often a loop turns: its index starts at a number, grows by a number and ends at a number."""
    bound_text = test["bound"].lstrip("%").split("_")[0]
    bound = int(bound_text) if bound_text.lstrip("-").isdigit() else constants.get(bound_text)
    if bound is None:
        return None
    start, stride = 0, 1
    grow = re.compile(
        rf"%{test['index']}_s\d+ = sadd\.s32 (?:(?P<a>\d+), %(?P<b>s\d+)_s\d+|%(?P<c>s\d+)_s\d+, (?P<d>\d+))"
    )
    for text in texts:
        found = grow.search(text)
        if found:
            stride = int(found["a"] or found["d"])
            phi = re.search(rf"%{found['b'] or found['c']}_s\d+ = sphi %(s\d+)_s\d+", " ".join(texts))
            if phi and phi[1] in constants:
                start = constants[phi[1]]
            break
    return max(1.0, -(-(bound - start) // stride))


def _regions(lines: list[str], depths: list[int]) -> list[Region]:
    texts = _by_bundle(lines)
    starts: dict[str, int] = {}
    for n, text in enumerate(texts):
        for region in _REGION.findall(text):
            starts.setdefault(region, n)
    found = []
    for n, text in enumerate(texts):
        for match in _SKIP.finditer(text):
            target = starts.get(match["region"])
            if target is not None and target > n + 1:
                found.append(Region(n + 1, target - 1, depths[n]))
    return found


def _use(path: Path) -> tuple[list[str], list[int], list[list[int]]]:
    """The columns of the table of use, the slots a bundle has of each, and those each bundle uses."""
    lines = path.read_text().splitlines()
    columns = [part.strip() for part in lines[1].split(",")]
    return columns, [int(n) for n in lines[2].split()], [[int(n) for n in line.split()] for line in lines[4:] if line]
