"""A study's table and picture, from made-up results."""

import pytest

from opacus_bpclip.ab.study.curves import curve, metric_within, shortest_training
from opacus_bpclip.ab.study.plot import draw
from opacus_bpclip.ab.study.report import in_short, render
from opacus_bpclip.ab.study.results import StudyRecord
from opacus_bpclip.ab.study.settings import Study
from opacus_bpclip.jobs.tables import PAGE, TERMINAL
from tests.ab.study.studies import STUDY, UNTUNED, finished, result


def metric_of(run):
    """``ours`` is better by 2 points on the mean, with its input clipping by less."""
    seed = run.settings.seed / 100
    if run.arm == "flat":
        return 0.90 + seed * (run.settings.lr == 0.25)
    without = run.settings.options["max_input_norm"] == "none"
    return 0.92 + 2 * seed if without else 0.8


def seconds_of(run):
    return 8.0 + run.settings.seed if run.arm == "flat" else 4.5


@pytest.fixture(scope="module")
def record():
    return finished(STUDY, metric_of, seconds_of)


def test_table(record):
    cell = [
        "digits: 1437 training and 360 test examples, model of 9,258 parameters",
        "epochs 2, epsilon 1.0",
        "",
        "arm   accuracy  deviation            difference  epsilon  training  equal time  seeds"
        "                     settings",
        "flat    91.00%      1.00%                     -    2.998       9 s      45.50%      3"
        "                      lr 0.25",
        "ours    94.00%      2.00%  +3.00 [+0.52, +5.48]    2.998     4.5 s      94.00%      3"
        "  lr 0.5, max_input_norm none",
    ]
    text = render(record, TERMINAL).splitlines()
    assert text[0] == (
        "Tuning: 2 combinations for each arm in each cell, with seeds 10 11, judged by 25% of the "
        "training set, on which they do not train. Epsilon does not account for tuning."
    )
    assert text[2:10] == ["low:", "", *cell]
    assert text[11] == "high:"
    assert text[-3] == "difference: to flat at the same seeds, and its 95% confidence interval."
    page = render(record, PAGE)
    assert "## low\n" in page
    assert "| ours | 94.00% | 2.00% | +3.00 [+0.52, +5.48] | 2.998 |" in page


def test_an_arm_that_has_what_the_baseline_has_is_level_with_it():
    level = finished(UNTUNED, lambda run: 0.9 + run.settings.seed / 100)
    assert render(level, TERMINAL).count("+0.00 [+0.00, +0.00]") == len(UNTUNED.cells)


def test_arms_without_results_are_listed_with_the_reason():
    record = StudyRecord.new(UNTUNED)
    assert render(record, TERMINAL).count("no results yet") == 2
    for run in record.runs:
        found = result(run)
        if run.arm == "flat":
            found = found.model_copy(update={"run": None, "note": "it cannot"})
        record = record.with_result(found)
    text = render(record, TERMINAL)
    assert text.count("flat: it cannot") == 2
    row = next(line for line in text.splitlines() if line.startswith("flat "))
    assert row.split() == ["flat", *"------", "0"]
    ours = next(line for line in text.splitlines() if line.startswith("ours "))
    assert ours.split()[3] == "-"  # there is nothing to be compared with


def test_what_waits_for_tuning_has_no_row_of_figures():
    record = StudyRecord.new(STUDY)
    for run in [each for each in record.runs if each.settings.held_out][:-1]:
        record = record.with_result(result(run, metric_of(run)))
    assert record.chosen("high", "ours") is None
    assert not record.complete
    assert "no results yet" in render(record, TERMINAL)


def test_a_run_in_a_line(record):
    first, last = record.asked[0], record.asked[-1]
    shared = "epochs 2, batch_size 128, momentum 0.9"
    assert in_short(first) == f"trial: low, flat, lr 0.25, {shared}, seed 10: 100.00%"
    told = f"lr 0.5, {shared}, max_input_norm none"
    assert in_short(last) == f"test: high, ours, {told}, seed 2: 96.00%"


def test_lines_tell_trials_apart_whatever_they_vary():
    grid = {"lr": [0.5], "batch_size": [32, 64], "max_grad_norm": [0.5, 1.0], "momentum": [0.3]}
    study = Study(
        cells={"one": {"epsilon": 3.0}}, arms={"flat": {}}, tuning={"grid": {"flat": grid}}
    )
    runs = [run for run in StudyRecord.new(study).runs if run.settings.held_out]
    lines = [in_short(result(run)) for run in runs]
    assert len(set(lines)) == len(lines) == 8


def test_time_is_compared_at_the_ends_of_epochs(record):
    curves = {arm: curve(record.published("low", arm)) for arm in STUDY.arms}
    assert [point.seconds for point in curves["flat"]] == [4.5, 9.0]
    assert [point.mean for point in curves["flat"]] == pytest.approx([0.455, 0.91])
    assert curves["ours"][-1][2:] == pytest.approx((0.92, 0.94, 0.96))
    assert shortest_training(curves) == 4.5
    assert metric_within(curves["flat"], 4.4) is None
    assert metric_within(curves["flat"], 9.0) == pytest.approx(0.91)
    assert metric_within(curves["flat"], None) is None


def test_an_arm_without_privacy_sets_no_time():
    study = Study(cells={"a": {}}, arms={"non-private": {}, "flat": {}}, seeds=[0, 1])
    record = finished(study, lambda run: 0.9, lambda run: 2.0 if run.arm == "flat" else 1.0)
    curves = {arm: curve(record.published("a", arm)) for arm in study.arms}
    assert shortest_training(curves) == 2.0
    assert shortest_training({"non-private": curves["non-private"]}) is None


@pytest.mark.parametrize("complete", [True, False])
def test_plot(complete, record, tmp_path):
    path = tmp_path / "study.svg"
    draw(record if complete else StudyRecord.new(STUDY), path)
    assert path.read_text().count("<svg ") == 1
