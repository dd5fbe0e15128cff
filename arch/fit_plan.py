"""How many groups and latents a FIT should have for a length: the split whose attention costs least.

Chen and Li 2023, arXiv:2305.12689. With L tokens in groups of n and m latents a group, the scores of one layer are
  local   L n            every token against its group,
  global  (L m / n)^2    every latent against every latent,
  cross   L m            every latent of a group against its tokens (read), or the tokens against them (write).
For a fixed m the sum over a local and b global layers is least at n = (2 b L m^2 / a)^(1/3): then the groups, L / n,
grow as L^(2/3) and the scores as L^(4/3). Fewer latents are always cheaper, so m is the user's choice: it is how much a
group can tell the others.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from arch.errors import ConfigError

LATENTS = 16  # a group, where nothing else is said
ALIGN = 8  # a group of a sequence is a multiple of so many tokens where that costs nothing much
SHAPE = re.compile(r"(\(\d+\)\d+)*\(\d+\)(\d+)?")
STRETCH = 2.0  # the longer side of a box over the shorter, at most
NEAR = 1.05  # of splits that cost so little more than the least, the one with the squarest boxes


@dataclass(frozen=True)
class Level:
    """A run of local layers; then, if there are global ones, a read, these and, unless the pattern ends, a write."""

    local_layers: int
    global_layers: int


def parse(pattern: str) -> tuple[Level, ...]:
    """The levels of a pattern: local layers in parentheses, global ones bare, by turns, as in "(2)4(2)".

    The first run is local (it may have no layers, "(0)4(2)"); the pattern ends with either.
    """
    text = pattern.replace(" ", "")
    if not SHAPE.fullmatch(text):
        raise ConfigError(
            "pattern",
            f"{pattern!r} is no pattern; write numbers of layers by turns, local in parentheses, global bare, local "
            'first, as in "(2)4(2)"',
        )
    pairs = re.findall(r"\((\d+)\)(\d+)?", text)
    levels = tuple(Level(int(local), int(many or 0)) for local, many in pairs)
    for level, (_, many) in zip(levels, pairs):
        if many and not level.global_layers:
            raise ConfigError("pattern", f"{pattern!r} has a global run of no layers; leave it out or give it some")
    if not any(level.global_layers for level in levels):
        raise ConfigError("pattern", f"{pattern!r} has no global layers, so no group sees another; add some: (2)4(2)")
    return levels


def reads_and_writes(levels: tuple[Level, ...]) -> int:
    """Cross-attentions in all: a read before every global run, a write behind it unless it stands last."""
    return sum(1 + (i < len(levels) - 1) for i, level in enumerate(levels) if level.global_layers)


@dataclass(frozen=True)
class Split:
    """A proposal: what a FIT's group_size, groups and latents would be, and the scores of one head it computes."""

    axes: tuple[int, ...]  # token axes
    group_size: tuple[int, ...]
    latents: int  # a group
    layers: int  # local and global
    local_scores: float
    global_scores: float
    cross_scores: float

    @property
    def groups(self) -> tuple[int, ...]:
        return tuple(-(-length // size) for length, size in zip(self.axes, self.group_size))

    @property
    def scores(self) -> float:
        return self.local_scores + self.global_scores + self.cross_scores

    def __str__(self) -> str:
        tokens, groups = prod(self.axes), prod(self.groups)
        return (
            f"{'x'.join(map(str, self.axes))} tokens: {groups} groups of {'x'.join(map(str, self.group_size))}, "
            f"{self.latents} latents each ({groups * self.latents} in all); scores a head: local "
            f"{self.local_scores:.3g}, global {self.global_scores:.3g}, cross {self.cross_scores:.3g}, together "
            f"{self.scores:.3g} ({self.scores / (self.layers * tokens**2):.2%} of those of {self.layers} full layers)"
        )


def cost(axes: tuple[int, ...], size: tuple[int, ...], latents: int, levels: tuple[Level, ...]) -> Split:
    """The scores of a split, groups that are filled up counted as full."""
    groups = prod(-(-length // step) for length, step in zip(axes, size))
    tokens = groups * prod(size)
    return Split(
        axes=axes,
        group_size=size,
        latents=latents,
        layers=sum(level.local_layers + level.global_layers for level in levels),
        local_scores=float(sum(level.local_layers for level in levels) * tokens * prod(size)),
        global_scores=float(sum(level.global_layers for level in levels) * (groups * latents) ** 2),
        cross_scores=float(reads_and_writes(levels) * tokens * latents),
    )


def propose(axes: int | tuple[int, ...], *, latents: int = LATENTS, pattern: str = "(2)4(2)") -> Split:
    """The split of a sequence (its length) or of a grid (its sides) with the fewest scores for so many latents a group.

    A sequence's group is a multiple of ALIGN tokens unless it is the whole sequence; a grid's is a box, no longer than
    STRETCH times its breadth. No group has fewer places than latents.
    """
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    levels = parse(pattern)
    local, far = (sum(getattr(level, name) for level in levels) for name in ("local_layers", "global_layers"))
    best = max(latents, round((2 * far * prod(axes) * latents**2 / max(local, 1)) ** (1 / 3)))  # of a real number n
    found = [cost(axes, size, latents, levels) for size in {axes, *_sizes(axes, best)} if prod(size) >= latents]
    if not found:
        raise ConfigError("latents", f"{latents} a group are more than the {prod(axes)} tokens in all; use fewer")
    least = min(split.scores for split in found)
    if len(axes) == 1:
        return next(split for split in found if split.scores == least)
    near = [split for split in found if split.scores <= NEAR * least]
    return min(near, key=lambda split: (_stretch(split.group_size), split.scores, split.group_size))


def _stretch(size: tuple[int, ...]) -> float:
    return max(size) / min(size)


def _sizes(axes: tuple[int, ...], best: int) -> Iterator[tuple[int, ...]]:
    """Group sizes worth a look: between a quarter and four times the best of real numbers."""
    if len(axes) == 1:
        low = max(ALIGN, best // 4 // ALIGN * ALIGN)
        yield from ((size,) for size in range(low, min(axes[0], 4 * best) + 1, ALIGN))
        return
    if len(axes) != 2:
        raise ConfigError("group_size", f"proposed for sequences and grids of two axes, not {len(axes)}; give it")
    for height in range(1, min(axes[0], 2 * best) + 1):
        for breadth in range(max(1, best // 4 // height), min(axes[1], 4 * best // height) + 1):
            if _stretch((height, breadth)) <= STRETCH:
                yield height, breadth
