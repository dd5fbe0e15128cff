"""The ListOps stream: pinned bytes, right labels, and the distribution of drawing whole trees and rejecting."""

import random
from statistics import median

import numpy as np
import pytest

from experiments.data.listops_generator import BLOCK, OPERATORS, TOKENS, Limits, generate, grow, make_block
from experiments.data.task import TokenExamples, content_hash

SHORT = Limits(min_length=16, max_length=64)
FLAT = Limits(min_length=32, max_length=128, max_depth=4, max_args=5)


@pytest.mark.parametrize(
    ("limits", "seed", "pin"),
    [
        (SHORT, 0, "392c93c901985aeddbba3208e870e53aba214d93fa70b13e851404ea1d43f36a"),
        (FLAT, 7, "e7c231c0aca758157371bfe54d2318819c01a959a05a29d129dbcc7833ae944e"),
        (Limits(), 3, "1611852a7255a82aa375f46ffd43a8bf3a23216fa2d4087422dc0832bba77576"),
    ],
)
@pytest.mark.parametrize("workers", [1, 3])
def test_same_bytes_everywhere(limits, seed, pin, workers):
    """A change here changes every data set: raise listops.VERSION and pin anew."""
    assert content_hash({"train": TokenExamples.pack(generate(300, seed, limits, workers))}) == pin


def test_seeds_and_blocks_differ():
    blocks = [make_block(seed, block, SHORT).tokens.tobytes() for seed in (0, 1, 2**64 - 1) for block in (0, 1)]
    assert len(set(blocks)) == 6


def parse(words):
    """Oracle: the tree of an expression as nested lists [operator, argument, ...], by recursive descent."""
    word = next(words)
    if not word.startswith("["):
        return int(word)
    tree = [word]
    while (argument := parse(words) if (head := peek(words)) != "X" else None) is not None:
        tree.append(argument)
    assert head == "X"
    next(words)
    return tree


class Words:
    """An iterator with one word of look-ahead."""

    def __init__(self, words):
        self.words, self.at = words, 0

    def __next__(self):
        self.at += 1
        return self.words[self.at - 1]


def peek(words):
    return words.words[words.at]


def value(tree):
    if isinstance(tree, int):
        return tree
    args = [value(argument) for argument in tree[1:]]
    return {"[MIN": min, "[MAX": max, "[MED": lambda x: int(median(x)), "[SM": lambda x: sum(x) % 10}[tree[0]](args)


def depth(tree):
    return 1 + max((depth(argument) for argument in tree[1:]), default=0) if isinstance(tree, list) else 1


def widths(tree):
    return [len(tree) - 1, *(w for child in tree[1:] for w in widths(child))] if isinstance(tree, list) else []


def nodes(tree):
    return 1 + sum(nodes(child) for child in tree[1:]) if isinstance(tree, list) else 1


@pytest.mark.parametrize("limits", [SHORT, FLAT, Limits()], ids=["short", "flat", "lra"])
def test_labels_and_limits_agree_with_an_independent_parser(limits):
    seen = set()
    operators, most_args, deepest = set(), 0, 0
    for tokens, label in generate(300, 1, limits):
        words = Words([TOKENS[token] for token in tokens])
        tree = parse(words)
        assert words.at == tokens.size, "tokens after the expression's end"
        assert label == value(tree)
        assert limits.min_length < tokens.size < limits.max_length
        assert min(widths(tree)) >= 2
        most_args, deepest = max(most_args, *widths(tree)), max(deepest, depth(tree))
        operators.update(words.words)
        seen.add(tokens.tobytes())
    assert len(seen) == 300
    assert operators == set(TOKENS) - {"<pad>"}
    assert (most_args, deepest) == (limits.max_args, limits.max_depth)


def draw_naively(rng, limits, depth=1):
    """LRA's procedure: a whole tree, as nested lists, and its length."""
    if depth == limits.max_depth or rng.random() > 0.25:
        return rng.randrange(10), 1
    children = [draw_naively(rng, limits, depth + 1) for _ in range(rng.randint(2, limits.max_args))]
    return [rng.choice(OPERATORS), *(tree for tree, _ in children)], 2 + sum(length for _, length in children)


def statistics_naive(trees, limits, seed):
    rng, kept = random.Random(seed), []
    for _ in range(trees):
        tree, length = draw_naively(rng, limits)
        if limits.min_length < length < limits.max_length:
            kept.append((length, value(tree), np.mean(widths(tree)), len(widths(tree)) / nodes(tree)))
    return np.array(kept)


def statistics_ours(blocks, limits, seed):
    kept = []
    for block in (make_block(seed, i, limits) for i in range(blocks)):
        for i, label in enumerate(block.labels):
            words = Words([TOKENS[token] for token in block.tokens[block.offsets[i] : block.offsets[i + 1]]])
            tree = parse(words)
            kept.append((words.at, label, np.mean(widths(tree)), len(widths(tree)) / nodes(tree)))
    return np.array(kept)


@pytest.mark.parametrize(
    ("limits", "blocks"),
    [(SHORT, 3), (FLAT, 12), (Limits(), 2), (Limits(min_length=20, max_length=60, max_depth=6, max_args=6), 8)],
    ids=["short", "flat", "lra", "narrow"],
)
def test_distribution_is_that_of_whole_trees_rejected(limits, blocks):
    """Share kept, length, value, arguments an operator, operators a node: all within 4 standard errors."""
    trees = blocks * BLOCK
    naive, ours = statistics_naive(trees, limits, seed=5), statistics_ours(blocks, limits, seed=5)
    share = (len(naive) + len(ours)) / (2 * trees)
    assert min(len(naive), len(ours)) > 200
    assert abs(len(naive) - len(ours)) < 4 * np.sqrt(2 * trees * share * (1 - share))
    for x, y in zip(naive.T, ours.T):
        for power in (1, 2):
            a, b = x**power, y**power
            assert abs(a.mean() - b.mean()) < 4 * np.sqrt(a.var() / a.size + b.var() / b.size)
    for label in range(10):
        a, b = naive[:, 1] == label, ours[:, 1] == label
        assert abs(a.mean() - b.mean()) < 4 * np.sqrt(a.var() / a.size + b.var() / b.size)


def length_law(limits):
    """Exact: P(length = n) of a whole tree, n < max_length, from the leaves up by convolution."""
    law = np.zeros(limits.max_length)
    law[1] = 1  # at max_depth: a digit
    for _ in range(limits.max_depth - 1):
        power, arguments = law, np.zeros_like(law)
        for _ in range(2, limits.max_args + 1):
            power = np.convolve(power, law)[: law.size]
            arguments += power / (limits.max_args - 1)
        law = np.zeros_like(law)
        law[1] = 3 / 4
        law[2:] += arguments[:-2] / 4
    return law


def test_length_law_by_hand():
    """Depth 2, two or three arguments, up to length 4: a digit, or an operator with two."""
    assert length_law(Limits(0, 5, 2, 3)).tolist() == [0, 0.75, 0, 0, 0.125]


@pytest.mark.parametrize(("limits", "blocks"), [(SHORT, 40), (FLAT, 120), (Limits(), 40)], ids=["short", "flat", "lra"])
def test_lengths_follow_the_exact_law(limits, blocks):
    """Chi-squared over the rejected and ten bins of kept lengths: 10 degrees of freedom, 35 has p = 1e-4."""
    law = length_law(limits)
    law[: limits.min_length + 1] = 0
    ends = np.searchsorted(np.cumsum(law) / law.sum(), np.arange(1, 10) / 10) + 1
    lengths = np.concatenate([grow(2, block, limits)[1] for block in range(blocks)])
    expected = np.array([part.sum() for part in np.split(law, ends)]) * blocks * BLOCK
    found = np.array([((lengths >= a) & (lengths < b)).sum() for a, b in zip([0, *ends], [*ends, limits.max_length])])
    rejected = blocks * BLOCK - np.array([expected.sum(), lengths.size])
    assert expected.min() > 100
    assert ((found - expected) ** 2 / expected).sum() + (rejected[1] - rejected[0]) ** 2 / rejected[0] < 35


def test_no_duplicates_where_they_abound():
    """Up to 7 tokens there are many repeats: about half of the kept trees."""
    tiny = Limits(min_length=3, max_length=6, max_depth=2)
    examples = [tokens.tobytes() for tokens, _ in generate(1500, 0, tiny)]
    drawn = [len(make_block(0, block, tiny).labels) for block in range(20)]
    assert len(set(examples)) == len(examples) == 1500
    assert sum(drawn) > 1500


def test_too_few_trees_is_an_error_that_names_the_remedy():
    """Length 4 and depth 2 is an operator with two digits: 4 * 10 * 10 expressions exist."""
    with pytest.raises(ValueError, match=r"only 400 distinct examples of 401 found.*lower min_length"):
        list(generate(401, 0, Limits(min_length=3, max_length=5, max_depth=2)))
