"""FIT's pattern, its cost model and the split it proposes."""

import numpy as np
import pytest

from arch.errors import ConfigError
from arch.fit_plan import Level, cost, parse, propose, reads_and_writes


def test_patterns():
    assert parse("(2)4(2)") == (Level(2, 4), Level(2, 0))
    assert parse("(2) 4 (2) 4 (2)") == (Level(2, 4), Level(2, 4), Level(2, 0))
    assert parse("(12)3") == (Level(12, 3),)
    assert parse("(0)4(2)") == (Level(0, 4), Level(2, 0))
    assert [reads_and_writes(parse(text)) for text in ("(2)4(2)", "(2)4", "(2)4(2)4(2)", "(1)1(1)1")] == [2, 1, 4, 3]


@pytest.mark.parametrize("text", ["", "4(2)", "(2)", "(2)0(2)", "(2)4(2", "2(4)2", "(2)(4)", "(a)4", "(2)-4(2)"])
def test_what_is_no_pattern(text):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert caught.value.path == "pattern"


def test_cost_counts_the_scores_one_by_one():
    """Against a count of pairs, for a sequence whose last group is filled up."""
    levels = parse("(2)3(1)")
    split = cost((22,), (4,), 3, levels)
    groups = 6
    assert split.local_scores == 3 * sum(4 * 4 for _ in range(groups))
    assert split.global_scores == 3 * (groups * 3) ** 2
    assert split.cross_scores == 2 * sum(4 * 3 for _ in range(groups))


@pytest.mark.parametrize("length", [100, 1_000, 7_777])
def test_the_proposal_is_the_best_of_all(length):
    levels = parse("(2)4(2)")
    split = propose(length, latents=4)
    every = [cost((length,), (n,), 4, levels).scores for n in range(8, length + 1, 8)]
    assert split.scores == min(every)


def test_the_exponent():
    """At the optimal split the scores grow as L^(4/3), the groups as L^(2/3); the best n is the closed form's."""
    lengths = [1_000 * 2**i for i in range(9)]
    splits = [propose(n, latents=16) for n in lengths]
    slope = np.polyfit(np.log(lengths), np.log([s.scores for s in splits]), 1)[0]
    assert 1.3 < slope <= 4 / 3 + 1e-6  # the cross scores are linear, so a little less
    groups = np.polyfit(np.log(lengths), np.log([s.groups[0] for s in splits]), 1)[0]
    assert groups == pytest.approx(2 / 3, abs=0.03)
    closed = (2 * 4 * lengths[-1] * 16**2 / 4) ** (1 / 3)
    assert splits[-1].group_size[0] == pytest.approx(closed, abs=8)
    assert "groups of" in str(splits[-1])


def test_grids_get_boxes():
    """160K tokens, a 6400 x 6400 image in patches of 16: 400 boxes of 20 x 20, about as cheap as the sequence."""
    split = propose((400, 400))
    assert (split.group_size, split.groups) == ((20, 20), (20, 20))
    assert split.scores < 1.06 * propose(160_000).scores
    high, wide = propose((30, 200)).group_size
    assert max(high, wide) <= 2 * min(high, wide)


def test_refusals():
    with pytest.raises(ConfigError) as caught:
        propose(10, latents=11)
    assert caught.value.path == "latents"
    with pytest.raises(ConfigError) as caught:
        propose((4, 4, 4), latents=2)
    assert caught.value.path == "group_size"
