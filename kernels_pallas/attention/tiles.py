"""Tile sizes of the chunked form, each with its measurement.

`looped`: the program is for a CPU, whose caches want few rows and heads at a time; other devices want all at once.
"""

ROWS = COLUMNS = 1024  # where every key is visible
SKIPPED = 1024  # where tiles can be left out; with STRIP 0.8 to 0.86 of the time of 512 without, 0.86 to 0.91 backward
STRIP = 256  # rows of an edge tile at a time, each as far right as they see; 128 is no faster from 2K, and more code
ELEMENTS = 1 << 20  # scores a step; where tiles can be left out, those of a single tile: more were no faster
LINE = 64  # columns a tile is made up to: 1001 by 1024 scores took 0.92 of the processor time of 1001 by 1001
BAND = (64, 256)  # queries a block of a band: window / 4 within these; for 128 at 8K, 128 was 1.4 times slower than 64
GATHERED = (16, 1024)  # the block sizes of a mask whose key blocks are gathered: smaller ones are slow products


def choose(batch, groups, queries, keys, skips, looped):
    """((batch rows, key heads) a step, queries a tile, keys a tile); skips: some tiles can be left out."""
    rows, columns = (SKIPPED, SKIPPED) if skips else (ROWS, COLUMNS)
    rows, columns = _even(queries, rows), _whole(_even(keys, columns))
    if skips and looped and min(queries, keys) > STRIP:  # strips of even size
        rows, columns = (-(-n // LINE) * LINE for n in (rows, columns))
    return _units(batch, groups, rows * columns, skips, looped), rows, columns


def choose_steps(batch, groups, blocks, elements, looped):
    """((batch rows, key heads), query blocks) a step; elements: the scores of one block and key head."""
    units = _units(batch, groups, blocks * elements, False, looped)
    most = max(1, ELEMENTS // elements) if units == (1, 1) or looped else blocks
    steps = -(-blocks // most)
    return units, -(-blocks // steps)


def band_rows(window):
    """Queries a block, where each sees `window` keys beside its own: few of them, as block + window are computed."""
    return min(max(-(-window // 64) * 16, BAND[0]), BAND[1])


def _units(batch, groups, elements, skips, looped):
    if not looped:
        return batch, groups
    most = max(1, (min(ELEMENTS, SKIPPED**2) if skips else ELEMENTS) // elements)
    heads = _divisor(groups, most)
    return (_divisor(batch, most // groups) if heads == groups else 1, heads)


def _divisor(number, most):
    return max(n for n in range(1, number + 1) if number % n == 0 and n <= max(most, 1))


def _whole(columns):
    """A wide tile's columns made up to whole lines of the product's kernel, by less than an eighth."""
    return -(-columns // LINE) * LINE if columns >= 8 * LINE else columns


def _even(length, most):
    """The smallest tile that needs as few tiles as `most` does, a multiple of 16 unless there is only one."""
    count = -(-length // most)
    return length if count == 1 else min(-(-length // (16 * count)) * 16, length)
