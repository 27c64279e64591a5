"""Ratios pair the steps of one round; results survive JSON to four digits."""

import pytest

from opacus_bpclip.bench.results import ArmResult, BenchRecord, Spread
from opacus_bpclip.bench.settings import OPACUS
from tests.bench.tiny import CNN, CURVE, comparison, record


def test_spread_interpolates_quartiles():
    assert Spread.of([4.0, 1.0, 2.0, 3.0]) == Spread(1.75, 2.5, 3.25)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_ratios_of_times_pair_a_rounds_steps_and_those_of_peaks_are_to_the_median():
    # 1.1, 1.1 and 1.2; the ratio of the medians over other pairs would differ.
    assert CNN.ratio("time", "layerwise-weighted") == pytest.approx((1.1, 1.1, 1.15))
    assert CNN.median("time", "hooks", to="joint-exact") == pytest.approx(1.5)
    assert CNN.median("memory", "layerwise-weighted") == pytest.approx(1.05)
    assert CNN.ratio("memory", "non-private").high == pytest.approx(1.5)


def test_what_was_not_measured_has_no_ratio():
    assert CNN.median("time", "functorch") is None
    assert CNN.ratio("time", "ew") is None
    assert CURVE[0].ratio("memory", "joint-exact") is None


def test_best_of_looks_at_one_quantity():
    assert CNN.best_of("time", OPACUS) == "ghost"
    assert CNN.best_of("memory", OPACUS) == "hooks"
    assert CNN.best_of("time", ("ew", "functorch")) is None


def test_results_come_back_from_a_file_with_each_list_on_one_line(tmp_path):
    path = tmp_path / "r.json"
    whole = record(CNN, *CURVE)
    whole.write(path)
    assert BenchRecord.read(path) == whole
    assert '"seconds": [ 1.0, 2.0, 4.0 ]' in path.read_text()
    arm = ArmResult("ew", seconds=(0.123456,))
    precise = CNN.model_copy(update={"arms": (arm,)})
    assert precise.model_dump()["arms"][0]["seconds"] == (0.1235,)


def test_a_point_measured_again_takes_the_old_ones_place():
    new = comparison("cnn26k", ArmResult("non-private", (1.0, 1.0)))
    assert record(CNN, *CURVE).with_result(new).results == (new, *CURVE)
    assert record(CNN).with_result(CURVE[0]).results == (CNN, CURVE[0])
