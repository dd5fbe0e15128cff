"""Tile sizes of the TPU kernels and all else that is known when tracing."""

import dataclasses

import jax.numpy as jnp

from kernels_pallas import mosaic_tpu

LANES = 128
VMEM = 56 << 20  # bytes a kernel may use: every generation has them
SLOTS = 20 << 20  # bytes of dq the backward pass may keep in VMEM; past that dq has a kernel of its own


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of one kernel: queries and keys a tile, and of the parts that a tile is computed in."""

    rows: int
    columns: int
    part_rows: int
    part_columns: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Hashable, so that a second call finds the first one traced."""

    queries: int  # T, before filling up to whole tiles
    keys: int  # S
    heads: int  # H, in packs of `pack`
    groups: int  # G
    pack: int  # heads side by side in the lanes of one block
    width: int  # K of a block, a multiple of 128
    value_width: int  # V of a block
    window: tuple[int | None, int | None]
    blocks: tuple[tuple[int, ...], bytes] | None  # shape and contents of the block mask
    marked: bool  # segment ids or padding
    scale: float
    activation: str
    dtype: str
    forward: Sizes
    backward: Sizes
    interpret: mosaic_tpu.Interpret

    @property
    def repeats(self) -> int:
        """R, query heads a key head."""
        return self.heads // self.groups

    @property
    def sets(self) -> int:
        """Tables of tiles: one, or one a head."""
        return 1 if self.blocks is None else self.blocks[0][0]


def plan(
    shape,
    dtype,
    *,
    window,
    block_mask,
    marked,
    scale,
    activation,
    forward=None,
    backward=None,
    interpret=False,
    kind=None,
) -> Plan:
    """shape: T, S, H, G, K, V; forward, backward: Sizes as tuples, the measured ones if None; kind: of device."""
    queries, keys, heads, groups, width, value_width = shape
    pack = 1  # two heads of 64 fill a block, where each has key heads of its own
    if width == value_width == LANES // 2 and groups == heads and heads % 2 == 0:
        pack = 2 if block_mask is None or len(block_mask) == 1 else 1
    key_width, deep = (-(-n * pack // LANES) * LANES for n in (width, value_width))
    plain = pack == 1 and key_width == LANES
    chosen = [
        fit(queries, keys, sizes(dtype, plain, back, kind) if given is None else Sizes(*given))
        for given, back in ((forward, False), (backward, True))
    ]
    return Plan(
        queries=queries,
        keys=keys,
        heads=heads,
        groups=groups,
        pack=pack,
        width=key_width,
        value_width=deep,
        window=window,
        blocks=None if block_mask is None else (block_mask.shape, block_mask.tobytes()),
        marked=marked,
        scale=float(scale),
        activation=activation,
        dtype=jnp.dtype(dtype).name,
        forward=chosen[0],
        backward=chosen[1],
        interpret=interpret,
    )


def sizes(dtype, plain: bool, backward: bool, kind: str | None) -> Sizes:
    """The tiles for a device kind (None: any); short sequences have them made smaller. plain: one head of 128 a block.

    By scripts/tpu_schedule.py, libtpu 0.0.52, bfloat16 4x4096x16x128 causal, bundles a token and head; parts of
    queries x keys. Forward, v5e, parts of 256 x 256: 12.14 at 1024 x 1024, 12.98 at 1024 x 512, 12.99 at 512 x 1024,
    13.84 at 512 x 512; v6e at 1024 x 1024 8.86, with parts of 512 x 512 8.29. Backward at 1024 x 1024, v5e 23.22 with
    parts of 256 x 256; v6e 17.66 with those, 13.56 with 256 x 512, 13.79 with 512 x 512. Others than plain, and float32
    (six passes of bfloat16 a product), have smaller tiles that compile sooner.
    """
    wide = kind in ("TPU v6 lite", "TPU7x")  # matrix units of 256 a side
    if jnp.dtype(dtype).itemsize == 4:
        return Sizes(256, 256, 256, 256)
    if backward:
        size = 1024 if plain else 512
        return Sizes(size, size, 256, 512 if wide else 256)
    return Sizes(1024, 1024, 512, 512) if wide else Sizes(1024, 1024, 256, 256)


def fit(queries: int, keys: int, most: Sizes) -> Sizes:
    rows, part_rows = _fit(queries, most.rows, most.part_rows)
    columns, part_columns = _fit(keys, most.columns, most.part_columns)
    return Sizes(rows, columns, part_rows, part_columns)


def _fit(length: int, most: int, part: int) -> tuple[int, int]:
    """The tile and its part, no longer than the length filled up to whole parts of at least 128."""
    whole = -(-length // LANES) * LANES
    part = min(part, whole)
    return min(most, -(-whole // part) * part), part
