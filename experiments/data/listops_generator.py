"""The ListOps generator of Long Range Arena, vectorised, with the same distribution and a reproducible stream.

Source: Nangia & Bowman 2018, arXiv:1804.06028; Tay et al. 2020, arXiv:2011.04006, and its released generator.

The tree. The root is at depth 1. A node at depth < max_depth is an operator with probability 1/4 and a digit otherwise;
a node at max_depth is always a digit. (LRA's constant is called VALUE_P, but a node is a *digit* when its draw is above
it: the other way round the mean tree would have a million nodes.) Digits are uniform in 0..9, operators in MIN, MAX,
MED, SM, argument counts in 2..max_args. A tree is kept if min_length < length < max_length, both exclusive, where an
operator counts 2 and a digit 1: the number of tokens of `[MAX 3 4 X`, parentheses dropped. MED is the median, rounded
down; SM is the sum mod 10. By the exact law of the lengths (computed in the tests) LRA's limits keep 8.28 % of trees,
with length mean 1035.0, standard deviation 393.8, p10 577, median 954, p90 1643.

How it is drawn. A block is BLOCK trees grown level by level, breadth first: one 64-bit word of Philox-4x64, keyed by
(seed, block), a node. A tree is abandoned as soon as the nodes already certain to exist reach max_length: that decision
reads only words already drawn, and words are independent, so the kept trees have exactly the distribution of drawing
whole trees and rejecting. Only NumPy's raw bit stream is used, which it guarantees across versions and machines; the
rest is integer arithmetic. A uniform choice of n is (32 bits * n) >> 32, off by less than n / 2^32.
Then sizes and values are summed bottom-up, positions top-down, and every token is written to its place.

Duplicates are dropped in block order over the whole stream, so nothing depends on how many workers there are.
"""

import hashlib
import itertools
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

DIGITS = tuple(str(digit) for digit in range(10))
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
TOKENS = ("<pad>", *DIGITS, *OPERATORS, "X")  # a token's id is its place; X closes an operator
PAD, FIRST_DIGIT, FIRST_OPERATOR, CLOSE = 0, 1, 11, 15
MIN, MAX, MED, SM = range(4)

BLOCK = 4096  # trees a block; part of the stream's definition, so changing it changes every hash
BARREN_BLOCKS = 64  # give up after so many blocks in a row without one new example
LOW_32 = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class Limits:
    """Which trees: depth and arguments bound the drawing, lengths (exclusive, in tokens) the keeping."""

    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_args: int = 10


class Block(NamedTuple):
    """Kept trees of one block, in order: tokens laid end to end, example i at tokens[offsets[i] : offsets[i + 1]]."""

    tokens: np.ndarray  # uint8 [sum of lengths]
    offsets: np.ndarray  # int64 [examples + 1]
    labels: np.ndarray  # uint8 [examples]


@dataclass(slots=True)
class Level:
    """The nodes of one depth of all trees of a block; children lie in the order of their parents."""

    tree: np.ndarray  # int32 [nodes], the tree each node belongs to
    word: np.ndarray  # uint64 [nodes], its random bits: 63-62 operator or digit, 33-32 which operator, 31-0 a choice
    operator: np.ndarray  # bool [nodes]

    def counts(self, limits: Limits) -> np.ndarray:
        """Argument counts of the operators, int64 [operators]."""
        return 2 + choose(self.word[self.operator], limits.max_args - 1)

    def kinds(self) -> np.ndarray:
        """Which operator (MIN, MAX, MED, SM) the operators are, uint8 [operators]."""
        return ((self.word[self.operator] >> np.uint64(32)) & np.uint64(3)).astype(np.uint8)

    def digits(self) -> np.ndarray:
        """Values of the digits, uint8 [digits]."""
        return choose(self.word[~self.operator], 10).astype(np.uint8)


def choose(word: np.ndarray, choices: int) -> np.ndarray:
    """A uniform choice in 0..choices-1 from the low 32 bits of each word."""
    return (((word & LOW_32) * np.uint64(choices)) >> np.uint64(32)).astype(np.int64)


def grow(seed: int, block: int, limits: Limits) -> tuple[list[Level], np.ndarray]:
    """Draws a block's trees, root level first; returns the nodes of the kept trees, and those trees' lengths."""
    stream = np.random.Philox(key=seed + (block << 64))
    length = np.zeros(BLOCK, np.int64)
    alive = np.ones(BLOCK, bool)
    tree = np.arange(BLOCK, dtype=np.int32)
    levels = []
    for depth in range(1, limits.max_depth + 1):
        word = stream.random_raw(tree.size)
        level = Level(tree, word, (word >> np.uint64(62) == 0) & (depth < limits.max_depth))
        levels.append(level)
        operators = tree[level.operator]
        length += np.bincount(tree, minlength=BLOCK) + np.bincount(operators, minlength=BLOCK)
        children = np.repeat(operators, level.counts(limits))
        alive &= length + np.bincount(children, minlength=BLOCK) < limits.max_length  # a child is a token at least
        tree = children[alive[children]]
        if not tree.size:
            break
    keep = alive & (length > limits.min_length)
    masks = [keep[level.tree] for level in levels]
    kept = [Level(x.tree[mask], x.word[mask], x.operator[mask]) for x, mask in zip(levels, masks)]
    return kept, length[keep]


def apply(kinds: np.ndarray, values: np.ndarray, counts: np.ndarray, max_args: int) -> np.ndarray:
    """Values of operators whose arguments lie end to end in values, counts[i] of them for operator i."""
    args = np.full((counts.size, max_args), 255, np.uint8)  # 255 sorts behind every digit
    used = np.arange(max_args) < counts[:, None]
    args[used] = values
    total = np.where(used, args, 0).sum(axis=1, dtype=np.int64) % 10
    args.sort(axis=1)
    row = np.arange(counts.size)
    median = (args[row, (counts - 1) // 2] + args[row, counts // 2]) // 2
    return np.choose(kinds, [args[:, 0], args[row, counts - 1], median, total]).astype(np.uint8)


def make_block(seed: int, block: int, limits: Limits) -> Block:
    """One block of the stream: a function of its arguments alone."""
    levels, lengths = grow(seed, block, limits)
    offsets = np.concatenate([[0], np.cumsum(lengths)])

    sizes: list[np.ndarray] = []  # tokens of each node's subtree; bottom-up, so the deepest level first
    below = values = np.zeros(0, np.uint8)
    for level in reversed(levels):
        size, values = np.ones(level.tree.size, np.int64), np.zeros(level.tree.size, np.uint8)
        values[~level.operator] = level.digits()
        if level.operator.any():
            counts = level.counts(limits)
            size[level.operator] = 2 + np.add.reduceat(sizes[-1], np.cumsum(counts) - counts)
            values[level.operator] = apply(level.kinds(), below, counts, limits.max_args)
        sizes.append(size)
        below = values

    tokens = np.zeros(offsets[-1], np.uint8)
    place = offsets[:-1]  # where each node's first token goes; top-down
    for level in levels:
        size, opened = sizes.pop(), place[level.operator]
        tokens[place[~level.operator]] = FIRST_DIGIT + level.digits()
        tokens[opened] = FIRST_OPERATOR + level.kinds()
        tokens[opened + size[level.operator] - 1] = CLOSE
        if opened.size:
            counts = level.counts(limits)
            before = np.cumsum(sizes[-1]) - sizes[-1]  # tokens of all earlier subtrees of the level below
            place = before + np.repeat(opened + 1 - before[np.cumsum(counts) - counts], counts)
    return Block(tokens, offsets, values)


def blocks(seed: int, limits: Limits, workers: int | None = None) -> Iterator[Block]:
    """The endless stream of blocks, in order. NumPy releases the interpreter's lock, so threads will do as workers."""
    workers = workers or os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        queue: deque[Future[Block]] = deque()
        try:
            for block in itertools.count():
                queue.append(pool.submit(make_block, seed, block, limits))
                if len(queue) > 2 * workers:
                    yield queue.popleft().result()
        finally:
            for waiting in queue:
                waiting.cancel()


def generate(count: int, seed: int, limits: Limits, workers: int | None = None) -> Iterator[tuple[np.ndarray, int]]:
    """The first count distinct examples (tokens uint8, label) of the stream.

    Raises:
      ValueError: BARREN_BLOCKS blocks in a row brought nothing new, so the limits admit too few trees.
    """
    seen: set[bytes] = set()
    barren = 0
    for block in blocks(seed, limits, workers):
        before = len(seen)
        for i, label in enumerate(block.labels):
            tokens = block.tokens[block.offsets[i] : block.offsets[i + 1]]
            key = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
            if key not in seen:
                seen.add(key)
                yield tokens, int(label)
                if len(seen) == count:
                    return
        barren = 0 if len(seen) > before else barren + 1
        if barren == BARREN_BLOCKS:
            raise ValueError(
                f"only {len(seen)} distinct examples of {count} found: {BARREN_BLOCKS * BLOCK} trees in a row brought "
                f"no new one with {limits.min_length} < length < {limits.max_length} at depth {limits.max_depth}; "
                "lower min_length, raise max_length or max_depth, or ask for fewer examples"
            )
