"""Ratios pair the steps of one round; results survive JSON to four digits."""

import json

import pytest

from opacus_bpclip.bench.results import Spread, comparison_from_dict, median_of
from tests.bench.tiny import CNN, CURVE


def test_spread_interpolates_quartiles():
    assert Spread.of([4.0, 1.0, 2.0, 3.0]) == Spread(1.75, 2.5, 3.25)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_time_ratio_pairs_the_steps_of_a_round():
    ratio = CNN.time_ratio("layerwise-weighted")
    # 1.1, 1.1 and 1.2; the ratio of the medians over other pairs would differ.
    assert ratio.median == pytest.approx(1.1)
    assert ratio.high == pytest.approx(1.15)
    assert CNN.time_ratio("hooks", to="joint-exact").median == pytest.approx(1.5)


def test_memory_ratio_is_to_the_median_peak():
    assert CNN.memory_ratio("layerwise-weighted").median == pytest.approx(1.05)
    assert CNN.memory_ratio("non-private").high == pytest.approx(1.5)


def test_what_was_not_measured_has_no_ratio():
    assert CNN.time_ratio("functorch") is None
    assert CNN.time_ratio("ew") is None
    assert CURVE[0].memory_ratio("joint-exact") is None
    assert median_of(None) is None


def test_best_of_looks_at_one_quantity():
    opacus = ("hooks", "functorch", "ew", "ghost")
    assert CNN.best_of(opacus) == "ghost"
    assert CNN.best_of(opacus, memory=True) == "hooks"
    assert CNN.best_of(("ew", "functorch")) is None


@pytest.mark.parametrize("own", [CNN, *CURVE])
def test_results_come_back_from_json(own):
    assert comparison_from_dict(json.loads(json.dumps(own.as_dict()))) == own
