"""What the bench concludes from repeated measurements."""

import pytest

from hvdkit.bench import statistic


def test_ratios_are_of_pairs():
    """The machine was half as fast in the second round: both were, so the ratio is the same."""
    found = statistic.ratio([200.0, 100.0, 210.0], [100.0, 50.0, 100.0])
    assert found == {"median": 2.0, "lowest": 2.0, "highest": pytest.approx(2.1), "noisy": False}


@pytest.mark.parametrize(("values", "noisy"), [([100, 101, 99, 100], False), ([100, 160, 60, 120], True), ([5], False)])
def test_noise_is_told(values, noisy):
    assert statistic.is_noisy(values) is noisy


def test_an_interval_holds_the_median_and_few_values_are_their_own():
    low, high = statistic.confidence_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert 1 <= low < 3 < high <= 5
    assert statistic.confidence_interval([2.0, 1.0]) == (1.0, 2.0)
    assert statistic.median_and_quartiles([1, 2, 3, 4, 5]) == (3.0, 2.0, 4.0)
