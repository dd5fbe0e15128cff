"""What the TPU kernels of both passes do within a tile. Scores lie transposed, keys [C] by queries [R]."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.attention.pallas_tpu_table import KIND, MASKED, STATIC, Table
from kernels_pallas.attention.tiles_tpu import LANES, Plan, Sizes

LOG2E = 1.4426950408889634
NEVER = -jnp.inf
LEAST = -1e30  # the running maximum before the first key: finite, so that exp2(NEVER - it) is 0


def fold(plan: Plan) -> float:
    """What queries are multiplied by: the softmax goes by powers of two, the sigmoid by the tanh of half the score."""
    return plan.scale * (LOG2E if plan.activation == "softmax" else 0.5)


def product(a, b, contract):
    """In float32, whole for float32 operands."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, ((contract[:1], contract[1:]), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def scaled(plan: Plan, q):
    return (q.astype(jnp.float32) * fold(plan)).astype(q.dtype)


def one_head(plan: Plan, x, p):
    """Rows of a pack of heads [R pack*K] with the lanes of all heads but the p-th zero."""
    if plan.pack == 1:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    each = x.shape[1] // plan.pack
    return jnp.where((lane >= p * each) & (lane < (p + 1) * each), x, jnp.zeros_like(x))


def head_rows(plan: Plan, x, p):
    """The p-th head's rows of a transposed pack [pack*K C]."""
    each = x.shape[0] // plan.pack
    return x[p * each : (p + 1) * each]


def branches(table: Table, flags, body):
    """Runs body(how) of the tile's kind; how: None if all is visible, an offset, or "any" for a mask of any sort."""
    found = table.kinds()
    for kind in sorted(found - {0}):
        how = None if kind < MASKED else "any" if kind == MASKED else table.offsets[kind - STATIC]
        pl.when((flags & KIND) == kind)(functools.partial(body, how))


class Mask:
    """Which pairs of the parts of a masked tile are visible."""

    def __init__(self, plan: Plan, sizes: Sizes, how, row, column, marks=None, piece=None):
        self.plan, self.sizes, self.how = plan, sizes, how
        self.row, self.column = row, column  # of the tile
        self.marks, self.piece = marks, piece  # ([1 R], [1 C]) references, and that of a piece of the block mask
        self.kept: dict[int, jax.Array] = {}

    def empty(self, c: int, r: int) -> bool:
        """Whether part c of the keys is known to be invisible to part r of the queries."""
        if self.how is None or self.how == "any":
            return False
        left, right = self.plan.window
        low, high = self._span(c, r)
        return (left is not None and high < -left) or (right is not None and low > right)

    def _span(self, c, r):
        sizes = self.sizes
        offset = self.how + c * sizes.part_columns - r * sizes.part_rows
        return offset - sizes.part_rows + 1, offset + sizes.part_columns - 1

    def apply(self, x, c: int, r: int, value=NEVER):
        """The part's scores [C R], `value` where not visible."""
        if self.how is None:
            return x
        if self.how == "any":
            return jnp.where(self._any(x.shape, c, r), x, value)
        left, right = self.plan.window
        low, high = self._span(c, r)
        offset = self.how + c * self.sizes.part_columns - r * self.sizes.part_rows
        if left is not None and low < -left:
            x = jnp.where(_difference(x.shape) >= -left - offset, x, value)
        if right is not None and high > right:
            x = jnp.where(_difference(x.shape) <= right - offset, x, value)
        return x

    def _any(self, shape, c, r):
        plan, sizes = self.plan, self.sizes
        left, right = plan.window
        first = self.row * sizes.rows + r * sizes.part_rows
        start = self.column * sizes.columns + c * sizes.part_columns
        offset = start - first - (plan.keys - plan.queries)
        seen = []
        if left is not None:
            seen.append(_difference(shape) >= -left - offset)
        if right is not None:
            seen.append(_difference(shape) <= right - offset)
        if plan.keys % sizes.columns:
            seen.append(jax.lax.broadcasted_iota(jnp.int32, shape, 0) < plan.keys - start)
        if self.marks is not None:
            seen.append(self._column_marks(c) == self._rows(self.marks[0], r))
        if self.piece is not None:
            seen.append(self._blocks(shape, first, start) > 0.5)
        total = seen[0]
        for each in seen[1:]:
            total = total & each
        return total

    def _rows(self, ref, r):
        return ref[0, :, r * self.sizes.part_rows : (r + 1) * self.sizes.part_rows]

    def _column_marks(self, c):
        """[1 C] -> [C R]: lanes become sublanes."""
        sizes = self.sizes
        if c not in self.kept:
            line = self.marks[1][0, :, c * sizes.part_columns : (c + 1) * sizes.part_columns]
            block = jnp.broadcast_to(line, (LANES, sizes.part_columns)).T
            self.kept[c] = jnp.concatenate([block] * (sizes.part_rows // LANES), 1)
        return self.kept[c]

    def _blocks(self, shape, first, start):
        """The piece of the block mask, each block spread over its tokens by products with zeros and ones."""
        plan = self.plan
        piece = self.piece[0]
        assert plan.blocks is not None
        deep, wide = plan.queries // plan.blocks[0][1], plan.keys // plan.blocks[0][2]

        def begin(tile, size, each):  # of the tile's first block, before its first token
            return jax.lax.div(tile * size, each) * each

        query = (
            first
            - begin(self.row, self.sizes.rows, deep)
            + jax.lax.broadcasted_iota(jnp.int32, (piece.shape[1], shape[1]), 1)
        )
        at = jax.lax.broadcasted_iota(jnp.int32, query.shape, 0) * deep
        across = jnp.where((query >= at) & (query < at + deep), 1.0, 0.0)
        key = (
            start
            - begin(self.column, self.sizes.columns, wide)
            + jax.lax.broadcasted_iota(jnp.int32, (shape[0], piece.shape[0]), 0)
        )
        at = jax.lax.broadcasted_iota(jnp.int32, key.shape, 1) * wide
        down = jnp.where((key >= at) & (key < at + wide), 1.0, 0.0)
        return _plain(_plain(down, piece), across)


def _plain(a, b):
    return jnp.dot(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def _difference(shape):
    """Key less query, within the part."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0) - jax.lax.broadcasted_iota(jnp.int32, shape, 1)
