import logging

import pytest

from kernels_pallas import dispatch


def fast(x):
    raise NotImplementedError("x is odd") if x % 2 else NotImplementedError("never")


def slow(x):
    if x > 9:
        raise NotImplementedError("x is large")
    return x + 1


TABLE = {"fast": fast, "slow": slow}


def test_named_runs_or_raises_its_own_reason():
    assert dispatch.call("op", TABLE, "slow", ("fast",), 1) == 2
    with pytest.raises(NotImplementedError, match="x is odd"):
        dispatch.call("op", TABLE, "fast", ("slow",), 1)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(KeyError, match="did you mean 'slow'"):
        dispatch.call("op", TABLE, "slwo", ("slow",), 1)


def test_automatic_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="archloom"):
        for _ in range(3):
            assert dispatch.call("op_of_this_test", TABLE, None, ("fast", "slow"), 1) == 2
    assert [record.getMessage() for record in caplog.records] == ["op_of_this_test: chose 'slow' (fast: x is odd)"]


def test_all_refusing_gives_every_reason():
    with pytest.raises(NotImplementedError, match="fast: x is odd; slow: x is large"):
        dispatch.call("op", TABLE, None, ("fast", "slow"), 11)
