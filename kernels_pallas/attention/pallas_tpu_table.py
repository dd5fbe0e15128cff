"""Which tiles the TPU kernels visit: tables made on the host, read by their index maps (scalar prefetch)."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, Int

from kernels_pallas.attention.tiles_tpu import LANES, Plan, Sizes

NONE, FULL, MASKED, STATIC = 0, 1, 2, 3  # STATIC + n: masked by causal and window alone, at the n-th of `offsets`
KIND, FIRST, LAST, FIRST_ROWS, LAST_ROWS = 15, 16, 32, 64, 128  # bits of `flags`
MOST_STATIC = 3  # masked offsets that get code of their own


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """The steps of the grid's sequential axis, one entry a step (and head, where each has its own mask).

    Args:
      rows, columns: the tile's place among the queries' tiles and the keys'.
      flags: its kind, whether it is the FIRST or LAST of its row (forward) or column (backward), and in the backward
        pass whether it is the FIRST_ROWS or LAST_ROWS of its row.
      slots: backward: where the row's dq is summed up.
      ready: backward: the next row whose dq is complete.
      parts: which of `masks` the tile needs.
      masks: the distinct pieces of the block mask under a tile, [keys' blocks, queries' blocks].
      offsets: of the tiles STATIC, first key - position of the first query.
    """

    rows: Int[np.ndarray, "J N"]
    columns: Int[np.ndarray, "J N"]
    flags: Int[np.ndarray, "J N"]
    slots: Int[np.ndarray, "J N"]
    ready: Int[np.ndarray, "J N"]
    parts: Int[np.ndarray, "J N"]
    masks: np.ndarray | None
    offsets: tuple[int, ...]

    @property
    def steps(self) -> int:
        return self.rows.shape[1]

    @property
    def most_slots(self) -> int:
        return int(self.slots.max()) + 1

    def kinds(self) -> set[int]:
        return set((self.flags & KIND).ravel().tolist())


@functools.lru_cache(maxsize=256)
def table(plan: Plan, sizes: Sizes, by_columns: bool) -> Table:
    """The visible tiles, row by row, or column by column with the places of dq."""
    kinds, offsets = classify(plan, sizes)
    parts, masks = _pieces(plan, sizes, kinds)
    made = [_steps(kind, part, by_columns) for kind, part in zip(kinds, parts)]
    longest = max(len(steps) for steps in made)
    filled = []
    for steps in made:  # a head with fewer tiles stays at its last one
        idle = (*steps[-1][:2], NONE, *steps[-1][3:])
        filled.append(steps + [idle] * (longest - len(steps)))
    fields = np.moveaxis(np.array(filled, np.int32), -1, 0)
    rows, columns, flags, slots, ready, places = fields
    return Table(rows, columns, flags, slots, ready, places, masks, offsets)


def classify(plan: Plan, sizes: Sizes) -> tuple[Int[np.ndarray, "J I N"], tuple[int, ...]]:
    """The kind of every tile, and the offsets of those masked by causal and window alone."""
    left, right = plan.window
    first, start = (np.arange(-(-n // m)) * m for n, m in ((plan.queries, sizes.rows), (plan.keys, sizes.columns)))
    last, stop = np.minimum(first + sizes.rows, plan.queries) - 1, np.minimum(start + sizes.columns, plan.keys) - 1
    shift = plan.keys - plan.queries
    low, high = start[None] - (last[:, None] + shift), stop[None] - (first[:, None] + shift)
    offset = start[None] - (first[:, None] + shift)
    seen, whole = np.ones(low.shape, bool), np.ones(low.shape, bool)
    if left is not None:
        seen, whole = seen & (high >= -left), whole & (low >= -left)
    if right is not None:
        behind = start[None] + sizes.columns - 1 - (first[:, None] + shift)  # with the keys made up to fill the tile
        seen, whole = seen & (low <= right), whole & (behind <= right)
    by_window = seen & ~whole
    tail = start + sizes.columns > plan.keys
    if right is not None and right <= 0:  # keys made up are behind all queries: masked as such
        tail = np.zeros_like(tail)
    other = np.broadcast_to(tail[None] | plan.marked, low.shape)
    seen, by_window, other = (np.repeat(x[None], plan.sets, 0) for x in (seen, by_window, other))
    if plan.blocks is not None:
        counts, areas = _count(plan, first, last, start, stop)
        seen, other = seen & (counts > 0), other | (counts < areas)
    static = seen & by_window & ~other
    offset = np.broadcast_to(offset[None], seen.shape)
    offsets = tuple(int(n) for n in np.unique(offset[static]))
    if len(offsets) > MOST_STATIC:
        static, offsets = np.zeros_like(static), ()
    kinds = np.where(seen, np.where(by_window | other, MASKED, FULL), NONE)
    for n, each in enumerate(offsets):
        kinds[static & (offset == each)] = STATIC + n
    return kinds, offsets


def block_mask(plan: Plan) -> Bool[np.ndarray, "J M N"]:
    assert plan.blocks is not None
    return np.frombuffer(plan.blocks[1], bool).reshape(plan.blocks[0])


def _count(plan: Plan, first, last, start, stop):
    """How many blocks of the mask under each tile are open, and how many there are."""
    mask = block_mask(plan)
    deep, wide = plan.queries // mask.shape[1], plan.keys // mask.shape[2]
    sums = np.zeros((len(mask), mask.shape[1] + 1, mask.shape[2] + 1), np.int64)
    sums[:, 1:, 1:] = mask.cumsum(1).cumsum(2)
    a, b, c, d = first // deep, last // deep + 1, start // wide, stop // wide + 1

    def at(rows, columns):
        return sums[:, rows[:, None], columns[None]]

    return at(b, d) - at(a, d) - at(b, c) + at(a, c), ((b - a)[:, None] * (d - c)[None])[None]


def _pieces(plan: Plan, sizes: Sizes, kinds):
    """Which piece of the block mask each tile needs, and the distinct pieces."""
    places = np.zeros_like(kinds)
    if plan.blocks is None or not (kinds == MASKED).any():
        return places, None
    mask = block_mask(plan)
    deep, wide = plan.queries // mask.shape[1], plan.keys // mask.shape[2]
    high, across = (-(-size // each) + 1 for size, each in ((sizes.rows, deep), (sizes.columns, wide)))
    found: dict[bytes, int] = {}
    pieces: list[np.ndarray] = []
    for j, row, column in zip(*np.nonzero(kinds == MASKED)):
        m, n = row * sizes.rows // deep, column * sizes.columns // wide
        part = mask[j, m : m + high, n : n + across].T
        piece = np.zeros((-(-across // 16) * 16, -(-high // LANES) * LANES), np.float32)
        piece[: part.shape[0], : part.shape[1]] = part
        key = piece.tobytes()
        if key not in found:
            found[key] = len(pieces)
            pieces.append(piece)
        places[j, row, column] = found[key]
    return places, np.stack(pieces)


def _steps(kinds, parts, by_columns):
    """(row, column, flags, slot, ready, part) of each step."""
    order = kinds.T if by_columns else kinds
    lines: list[list[tuple[int, int]]] = []
    for line in range(len(order)):
        places = np.flatnonzero(order[line]) if order[line].any() else np.zeros(1, int)  # zeros are written there too
        lines.append([(int(n), line) if by_columns else (line, int(n)) for n in places])
    if by_columns:
        absent = sorted(set(range(len(kinds))) - {row for each in lines for row, _ in each})
        lines[-1] += [(row, len(kinds[0]) - 1) for row in absent]
    steps = [(row, column, n == 0, n == len(each) - 1) for each in lines for n, (row, column) in enumerate(each)]
    final = {row: n for n, (row, *_) in enumerate(steps)}
    free: list[int] = []
    taken: dict[int, int] = {}
    count, out = 0, []
    for n, (row, column, first, last) in enumerate(steps):
        flags = int(kinds[row, column]) | FIRST * first | LAST * last
        if row not in taken:
            taken[row] = free.pop() if free else count
            count = max(count, taken[row] + 1)
            flags |= FIRST_ROWS
        if final[row] == n:
            flags |= LAST_ROWS
        out.append([row, column, flags, taken[row], 0, int(parts[row, column])])
        if final[row] == n and by_columns:
            free.append(taken[row])
    ready = 0
    for step in reversed(out):
        ready = step[0] if step[2] & LAST_ROWS else ready
        step[4] = ready
    return [tuple(step) for step in out]
