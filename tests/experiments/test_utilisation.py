import pytest

from experiments import utilisation


def test_mfu_counts_the_model_three_times():
    assert utilisation.mfu(forward_flops=2e12, examples_per_second=10, peak_flops=120e12) == pytest.approx(0.5)


def test_peak_is_known_or_none():
    assert utilisation.peak("NVIDIA H200") == 989e12
    assert utilisation.peak("abacus") is None
