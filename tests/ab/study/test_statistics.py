"""Means, spreads and paired differences, against scipy's own test."""

import pytest
from scipy import stats

from opacus_bpclip.ab.study.statistics import deviation, paired_difference

OWN = {0: 0.91, 1: 0.95, 2: 0.93, 3: 0.96}
OTHER = {3: 0.94, 2: 0.92, 1: 0.92, 0: 0.9, 7: 0.1}


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_interval_is_that_of_the_paired_t_test(confidence):
    found = paired_difference(OWN, OTHER, confidence)
    pairs = [OWN[seed] for seed in OWN], [OTHER[seed] for seed in OWN]
    interval = stats.ttest_rel(*pairs).confidence_interval(confidence)
    assert found.mean == pytest.approx(0.0175)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_equal_differences_have_an_interval_of_no_width():
    found = paired_difference({0: 3.0, 1: 5.0}, {0: 1.0, 1: 3.0})
    assert found == (2.0, 2.0, 2.0)


def test_one_seed_has_no_spread():
    assert paired_difference({0: 1.0, 1: 2.0}, {1: 1.0, 2: 1.0}) is None
    assert deviation([0.5]) is None
    assert deviation([0.0, 2.0]) == pytest.approx(2**0.5)
