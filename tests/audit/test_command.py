"""Options, their defaults, and the exit status."""

import json

import pytest

from opacus_bpclip import AdaptiveThreshold, BackpropClipping
from opacus_bpclip.__main__ import main
from opacus_bpclip.audit import CASES, audit, job
from opacus_bpclip.audit.job import clipping_of
from opacus_bpclip.audit.settings import CASE_NAMES, Settings, Task, tasks
from tests.audit.mechanisms import clipped, target

# Where the code of a user's own is.
OWN = "tests.audit.own:"


def run(options):
    return main(["audit", "--processes", "1", *options.replace("OWN:", OWN).split()])


def test_without_options_every_case_is_audited_in_every_combination():
    planned = tasks(Settings())
    # The three cases of several layers also with moving thresholds, in their turns.
    assert len(planned) == 12 * 2 * 3 * 2 + 3 * 2
    assert {task.case for task in planned} == set(CASES) == set(CASE_NAMES)
    statistical = [task for task in planned if task.trials]
    # Each case once, and those of several layers with both ways to spend the budget.
    assert [task.case for task in statistical] == [
        *CASE_NAMES[:-3],
        # With a fixed threshold and with one that moves.
        *(name for name in CASE_NAMES[-3:] for _ in range(2 * len(Settings().allocation))),
    ]
    # Every bound has its turn with every loss, and with each way to spend the budget.
    assert len({(task.loss_reduction, task.bound) for task in statistical}) == 6
    assert len({(task.allocation, task.bound) for task in statistical}) == 6
    assert {task.trials for task in statistical} == {10_000}


def test_a_threshold_that_is_named_alone_is_that_of_every_case():
    assert {task.threshold for task in tasks(Settings(threshold=("adaptive",)))} == {"adaptive"}
    clipping = clipping_of(Settings(), tasks(Settings(threshold=("adaptive",)))[0])
    assert clipping.threshold == AdaptiveThreshold()


def test_full_judges_every_combination():
    assert all(task.trials == 10_000 for task in tasks(Settings(full=True)))


def test_the_turn_of_a_case_does_not_depend_on_the_others():
    whole = {task.name for task in tasks(Settings()) if task.trials}
    alone = {task.name for task in tasks(Settings(case=("conv",))) if task.trials}
    assert alone == {name for name in whole if name.startswith("conv")}


def test_a_model_is_audited_as_it_is_trained_unless_asked_otherwise():
    one = Settings(model="a:b", input="3")
    assert [(t.name, t.case, t.trials) for t in tasks(one)] == [
        ("a:b, joint, exact, mean", None, 10_000)
    ]
    more = {"bound": ("exact", "product"), "allocation": ("joint", "equal")}
    assert len(tasks(Settings(model="a:b", input="3", **more))) == 4


@pytest.mark.parametrize(
    ("given", "allocation", "bound", "expected"),
    [
        ({}, "joint", "exact", None),
        ({}, "joint", "product", 3.0),
        ({}, "dimension", "exact", 3.0),
        ({"max_input_norm": 2.0}, "joint", "exact", 2.0),
        ({"max_input_norm": None, "bound": ("exact",)}, "dimension", "exact", None),
    ],
)
def test_inputs_are_clipped_where_that_is_to_be_seen(given, allocation, bound, expected):
    task = Task("a", "linear", allocation, bound, "mean", "fixed", 0)
    assert job.clipping_of(Settings(**given), task).max_input_norm == expected


def test_the_library_as_it_is_by_default_is_among_what_is_audited():
    settings = Settings()
    found = {job.clipping_of(settings, task) for task in tasks(settings)}
    assert BackpropClipping() in found


def test_a_pass(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = "--case embedding --allocation joint --bound exact --loss-reduction sum --trials 100"
    assert run(f"{case} --json a.json --markdown a.md --plot a.png") == 0
    out, err = capsys.readouterr()
    assert err == "1 of 1  embedding, joint, exact, sum: pass\n"
    assert "embedding             1    144          1.0000    same     pass" in out
    assert "pass: no violation found in the target. This is evidence, not proof." in out
    assert "page: a.md\nplot: a.png\ndata: a.json\n" in out
    (found,) = json.loads((tmp_path / "a.json").read_text())["results"]
    assert (found["outcome"], found["task"]["case"]) == ("pass", "embedding")
    assert (tmp_path / "a.md").read_text().startswith("# Audit report\n\n    opacus-bpclip")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_an_audit_that_is_too_weak_has_a_status_of_its_own(capsys, monkeypatch):
    half = target(**clipped(lambda rows: rows / 2))
    monkeypatch.setattr(job, "audit", lambda *args, **options: audit(half, trials=0, searches=0))
    assert run("--case bias --allocation joint --bound exact --trials 0 --no-progress") == 3
    out = capsys.readouterr().out
    assert "INCONCLUSIVE: the audit was too weak on 2 of 2 targets:\n\n- Gaussian: inconclu" in out


@pytest.mark.parametrize(
    "options",
    [
        "--model OWN:net --input 4 --full --trials 100",
        "--model OWN:net --input OWN:batch --loss OWN:loss --trials 0",
        "--model OWN:net --input OWN:batch --loss OWN:sum_loss --loss-reduction sum "
        "--allocation dimension --max-grad-norm 2 --trials 0",
        "--model OWN:tokens --input 3 --vocabulary 7 --trials 0",
    ],
)
def test_a_users_own_model(options, capsys):
    assert run(options) == 0
    assert "pass: no violation found in the target" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            "--model OWN:net --input OWN:batch --loss OWN:broken_loss",
            "OWN:net, joint, exact, mean cannot be audited: TypeError: no such loss (raised at ",
        ),
        (
            "--model OWN:Two --input OWN:batch --loss OWN:loss",
            "OWN:Two, joint, exact, mean cannot be audited: TypeError: cross_entropy_loss(): ",
        ),
    ],
)
def test_an_error_in_the_users_code_is_one_line(options, text, capsys):
    assert run(f"{options} --trials 0") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"opacus-bpclip audit: error: {text.replace('OWN:', OWN)}")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--target OWN:absent", "module 'tests.audit.own' has no attribute 'absent'\n"),
        ("--target OWN:NUMBER", "OWN:NUMBER is neither callable nor a Target\n"),
        ("--target OWN:number", "OWN:number makes a int, not a Target\n"),
        ("--model OWN:number --input 4", "OWN:number makes a int, not a Module\n"),
        (
            "--model OWN:greedy --input 4",
            "OWN:greedy cannot be called without arguments: greedy() missing 1 required "
            "positional argument: 'size'\n",
        ),
        (
            "--model OWN:Two --input 4",
            "the model's output is a tuple, not one tensor; name a loss that takes it\n",
        ),
        (
            "--model OWN:net --input 5",
            "error: --model OWN:net with --input 5: RuntimeError: mat1 and mat2 shapes",
        ),
        (
            "--model OWN:net --input 4 --vocabulary 3",
            "error: --model OWN:net with --input 4: RuntimeError: mat1 and mat2 must have",
        ),
        (
            "--model OWN:net --input OWN:nothing",
            "--input OWN:nothing makes a NoneType, not a batch: a tensor, or a tuple of tensors\n",
        ),
        (
            "--model OWN:net --input OWN:net",
            "error: --input OWN:net: TypeError: net() takes 0 positional arguments but 1 ",
        ),
        # One line for each problem of the model.
        ("--model OWN:batch_norm --input 4", "\n- 1 normalises over the batch"),
    ],
)
def test_a_users_code_that_cannot_be_audited_is_refused_before_any_work(options, text, capsys):
    assert run(options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert text.replace("OWN:", OWN) in err


def test_every_target_has_a_seed_of_its_own_that_stays():
    planned = tasks(Settings())
    assert len({task.seed(0) for task in planned}) == len(planned)
    assert planned[0].seed(0) != planned[0].seed(1)
    assert planned[0].seed(0) == tasks(Settings())[0].seed(0)
