"""A study's file: what it asks for, and the one line that each mistake is answered by."""

import re
from pathlib import Path

import pytest

from opacus_bpclip import AdaptiveThreshold, BackpropClipping, InputWhitening, ThresholdSchedule
from opacus_bpclip.__main__ import main
from opacus_bpclip.ab.study.file import read_study
from opacus_bpclip.ab.study.settings import Study
from opacus_bpclip.jobs.errors import UsageError
from tests.ab.study.studies import STUDY
from tests.whitening.helpers import batch

ROOT = Path(__file__).parents[3]
STUDIES, PAGE = ROOT / "benchmarks/studies", ROOT / "docs/study.md"
TEXT = """\
seeds = [0, 1, 2]
baseline = "flat"

[settings]
epochs = 2

[cells.low]
epsilon = 1.0
[cells.high]
epsilon = 3.0

[arms.flat]
[arms.ours]
arm = "backprop"
lr = 0.5
options = { max_input_norm = 3.0 }

[tuning]
held_out = 0.25
seeds = [10, 11]
grid.flat = { lr = [0.25, 0.5] }
grid.ours = { options = { max_input_norm = [3.0, "none"] } }
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "two-ways.toml"


def test_a_file_is_a_study(path):
    path.write_text(TEXT)
    assert read_study(path) == STUDY.replace(title="two-ways")


def test_runs_have_the_settings_of_all_that_they_belong_to():
    (run, *_), (flat, *_) = STUDY.published("low", "ours", {}), STUDY.published("high", "flat", {})
    assert (run.arm, run.seed, run.epsilon, run.epochs, run.lr) == ("backprop", 0, 1.0, 2, 0.5)
    assert (flat.arm, flat.epsilon, flat.lr, flat.threads, flat.held_out) == ("flat", 3, 0.1, 1, 0)
    assert run.backprop("backprop") == BackpropClipping(max_input_norm=3.0)
    chosen = {"lr": 2.0, "options": {"max_input_norm": "none", "bound": "weighted"}}
    runs = STUDY.published("low", "ours", chosen)
    assert [own.seed for own in runs] == [0, 1, 2]
    assert runs[0].lr == 2.0
    assert runs[0].backprop("backprop") == BackpropClipping(bound="weighted")


def test_options_go_to_the_arms_own_clipping():
    study = Study(cells={"a": {}}, arms={"paper": {"options": {"max_input_norm": 5.0}}})
    (run, *_) = study.published("a", "paper", {})
    paper = BackpropClipping.paper()
    assert run.backprop("paper") == BackpropClipping(paper.allocation, "product", 5.0)
    assert run.input_norm("paper") == 5.0


@pytest.mark.parametrize(
    ("table", "made"),
    [
        ({}, AdaptiveThreshold()),
        ({"initial": 0.1, "ramp_steps": 5}, AdaptiveThreshold(initial=0.1, ramp_steps=5)),
        ({"initial": 0.5, "final": 0.1, "steps": 9}, ThresholdSchedule(0.5, 0.1, 9)),
        ("none", None),
    ],
)
def test_a_table_is_an_option_with_options_of_its_own(table, made):
    study = Study(cells={"a": {}}, arms={"backprop": {"options": {"threshold": table}}})
    (run, *_) = study.published("a", "backprop", {})
    assert run.backprop("backprop") == BackpropClipping(threshold=made)


def test_a_name_is_a_function_where_one_may_be_given():
    whitening = {"rank": 4, "probes": "tests.whitening.helpers:batch"}
    study = Study(cells={"a": {}}, arms={"backprop": {"options": {"whitening": whitening}}})
    (run, *_) = study.published("a", "backprop", {})
    made = run.backprop("backprop").whitening
    assert made == InputWhitening(batch, rank=4)


def test_a_mapping_of_names_stays_one():
    shares = {"0": 1.0, "3": 2.0}
    study = Study(cells={"a": {}}, arms={"paper": {"options": {"allocation": shares}}})
    (run, *_) = study.published("a", "paper", {})
    assert dict(run.backprop("paper").allocation) == shares


def test_trials_are_all_combinations_on_held_out_examples():
    grid = {"flat": {"lr": [1, 2], "momentum": [0.0, 0.5, 0.9]}}
    study = Study(cells={"a": {}}, arms={"flat": {}}, tuning={"grid": grid, "seeds": [7, 8]})
    trials = study.trials("a", "flat")
    assert [(point["lr"], point["momentum"]) for point, _ in trials] == [
        *((1, 0.0), (1, 0.5), (1, 0.9)),
        *((2, 0.0), (2, 0.5), (2, 0.9)),
    ]
    for point, runs in trials:
        assert [run.seed for run in runs] == [7, 8]
        assert all(run.lr == point["lr"] and run.held_out == 0.2 for run in runs)


def test_where_the_data_lie_is_no_part_of_a_run(path):
    path.write_text(TEXT)
    here, there = read_study(path), read_study(path, path.parent)
    (one, *_), (other, *_) = (study.published("low", "flat", {}) for study in (here, there))
    assert other.data_root == path.parent
    assert one.identity == other.identity
    assert str(path.parent) not in other.model_dump_json()


MISTAKES = {
    ("epochs = 2", "epochs = 0"): "cell low, arm flat: epochs: must be greater than or equal to 1",
    ("epochs = 2", "epoch = 2"): "cell low, arm flat: epoch: Extra inputs are not permitted",
    ("epochs = 2", "seeds = [1]"): "settings.seeds: the study sets it itself",
    ("epochs = 2", "lr = [1, 2]"): "cell low, arm flat: lr: must be a valid number",
    ("[settings]", "[setting]"): "setting: Extra inputs are not permitted",
    ("[arms.flat]", "[arms.flat]\nepsilon = 9.0"): (
        "arms.flat.epsilon: all arms of a cell share it, so set it in the cell"
    ),
    ("[arms.flat]", "[arms.flat]\nloss = 'torch.nn:NLLLoss'"): (
        "arms.flat.loss: all arms of a cell share it, so set it in the cell"
    ),
    ("grid.flat = {", "grid.flat = { model = ['a:b', 'c:d'],"): (
        "tuning.grid.flat.model: all arms of a cell share it, so set it in the cell"
    ),
    ("[arms.flat]", "[arms.flat]\noptions = { bound = 'exact' }"): (
        "cell low, arm flat: options: the arm flat has none of BackpropClipping"
    ),
    ("[cells.low]", "[cells.low]\noptions = { bound = 'exact' }"): (
        "cells.low.options: it is an arm's own, so set it in the arm"
    ),
    ("{ max_input_norm = 3.0 }", "3"): (
        "arms.ours.options must be a table of the options of BackpropClipping"
    ),
    ("{ max_input_norm = [3.0, ", "{ max_input_norms = [3.0, "): (
        "cell low, arm ours: options: BackpropClipping has no max_input_norms"
    ),
    ("[3.0, ", "[-1, "): (
        "cell low, arm ours: Expected max_input_norm=-1 to be a finite number > 0, or None."
    ),
    ("{ max_input_norm = 3.0 }", "{ threshold = { inital = 3.0 } }"): (
        "cell low, arm ours: Expected threshold={'inital': 3.0} to be an AdaptiveThreshold, a "
    ),
    ("{ max_input_norm = 3.0 }", "{ whitening = { probes = 'opacus_bpclip:no' } }"): (
        "cell low, arm ours: options: cannot load opacus_bpclip:no: module 'opacus_bpclip' has no"
    ),
    ('arm = "backprop"', ""): "cell low, arm ours: arms.0: must be 'non-private', 'flat', 'flat+i",
    ("[0.25, 0.5]", "[0.25]"): (
        "tuning.grid: all arms must have as many trials, not flat 1, ours 2"
    ),
    ("grid.flat =", "grid.fat ="): "tuning.grid.fat: there is no such arm",
    ("[0.25, 0.5]", "[0.5, 0.5]"): "tuning: grid.flat.lr: must not name anything twice",
    ("[arms.flat]", "[arms.flat]\naccountant = 'gdp'"): (
        "arms.flat.accountant: all arms of a cell share it, so set it in the cell"
    ),
    ("[0.25, 0.5]", "0.5"): "tuning: grid.flat.lr: must be a list of values",
    ("[10, 11]", "[2, 10]"): "tuning.seeds: 2 is published, and must not be tuned on",
    ("[10, 11]", "[10, 10]"): "tuning.seeds: must not name anything twice",
    ("held_out = 0.25", "held_out = 1"): "tuning.held_out: must be less than 1",
    ('baseline = "flat"', 'baseline = "fast"'): "baseline: there is no arm fast",
}


@pytest.mark.parametrize(("change", "text"), MISTAKES.items(), ids=lambda own: str(own)[:40])
def test_mistakes(change, text, path):
    assert change[0] in TEXT
    path.write_text(TEXT.replace(*change, 1))
    with pytest.raises(UsageError) as caught:
        read_study(path)
    assert str(caught.value).startswith(f"{path}: {text}")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "--study {} cannot be read: [Errno 2] No such file or directory: '{}'"),
        ("seeds = [", "--study {} cannot be read: Invalid"),
        ("", "{} needs at least one [cells.NAME] and one [arms.NAME]"),
        ("cells = 3", "{}: cells: must be a valid dictionary"),
    ],
)
def test_files_that_are_no_study(text, told, path):
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_study(path)
    assert str(caught.value).startswith(told.format(path, path))


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda own: own.stem)
def test_the_studies_of_the_repository_are_in_order(path, monkeypatch):
    # Where their commands run.
    monkeypatch.syspath_prepend(STUDIES)
    study = read_study(path)
    assert study.baseline in study.arms
    # One that tunes nothing says where its settings come from.
    assert study.tuning or "# Learning rates of" in path.read_text()


def test_the_study_of_the_documentation_is_one(path):
    (text,) = re.findall(r"^```toml\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    path.write_text(text)
    study = read_study(path)
    (run, *_) = study.published("high", "ours", {})
    assert run.backprop(run.arm) == BackpropClipping(
        allocation="dimension", layer_noise="dimension", threshold=AdaptiveThreshold(initial=0.5)
    )


def test_the_command_line_has_no_settings_beside_a_file(path, capsys):
    path.write_text(TEXT)
    assert main(["ab", "--study", str(path), "--seeds", "0", "--lr", "1"]) == 2
    assert capsys.readouterr().err == (
        "opacus-bpclip ab: error: --lr beside --study: the study's file says what to measure\n"
    )
    assert list(path.parent.iterdir()) == [path]
