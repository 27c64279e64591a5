"""A study's way: tune on held-out examples, publish with what was chosen, go on after a stop."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from opacus_bpclip.__main__ import main
from opacus_bpclip.ab import privacy
from opacus_bpclip.ab.study import job
from opacus_bpclip.ab.study.job import StudyJob
from opacus_bpclip.ab.study.results import StudyRecord
from opacus_bpclip.ab.study.settings import Study
from opacus_bpclip.jobs.errors import JobError, UsageError
from opacus_bpclip.jobs.running import measured
from opacus_bpclip.jobs.settings import Output
from tests.ab.study.studies import PLAN, STUDY, UNTUNED, result


class Trained:
    """Stand in for training: remember what was asked for, and fail at the end where told to."""

    def __init__(self, metric_of):
        self.metric_of, self.runs, self.most = metric_of, [], None

    def __call__(self, function, calls, *, processes):
        assert function is job.train
        for run, plan in calls:
            if len(self.runs) == self.most:
                raise JobError("out of luck")
            assert plan == PLAN
            self.runs.append(run)
            yield result(run, self.metric_of(run))


def metric_of(run):
    """``flat`` does best at the first learning rate in one cell and at the last in the other."""
    if run.arm == "flat":
        better = run.settings.lr == (0.25 if run.cell == "low" else 0.5)
        return 0.6 if better else 0.5
    return 0.8 if run.settings.backprop("backprop").max_input_norm is None else 0.7


@pytest.fixture
def trained(monkeypatch):
    stub = Trained(metric_of)
    monkeypatch.setattr(job, "call_in_children", stub)
    monkeypatch.setattr(job, "plan_for", lambda settings, task: PLAN)
    monkeypatch.setattr(job, "_task", lambda settings: None)
    monkeypatch.setattr(job.trial, "check", lambda task, settings: None)
    monkeypatch.setattr(job.trial, "problem_of", lambda *args: "")
    return stub


@pytest.fixture
def path(tmp_path):
    return tmp_path / "study.jsonl"


def run_study(study, path):
    output = Output(data=path, resume=True, progress=False)
    return measured(StudyJob(study, processes=2), output)


def test_each_arm_is_tuned_as_much_and_published_with_its_best(trained, path):
    done = run_study(STUDY, path)
    assert done.complete
    held_out = [bool(run.settings.held_out) for run in trained.runs]
    assert held_out == [True] * 16 + [False] * 12
    trials = Counter((run.cell, run.arm) for run in trained.runs[:16])
    assert set(trials.values()) == {4}
    assert {run.settings.seed for run in trained.runs[:16]} == {10, 11}
    assert done.chosen("low", "flat") == {"lr": 0.25}
    assert done.chosen("high", "flat") == {"lr": 0.5}
    assert done.chosen("low", "ours") == {"options": {"max_input_norm": "none"}}
    assert {run.settings.lr for run in trained.runs[16:] if run.cell == "low"} == {0.25, 0.5}
    assert [each.run.metric for each in done.published("high", "ours")] == [0.8] * 3


def test_the_first_of_equal_trials_is_chosen_and_the_smaller_of_losses(trained, path):
    trained.metric_of = lambda run: 0.5
    assert run_study(STUDY, path).chosen("low", "flat") == {"lr": 0.25}
    path.unlink()
    trained.metric_of = metric_of
    losses = replace(PLAN, measure=replace(PLAN.measure, higher_is_better=False))
    done = run_study(STUDY, path)
    results = tuple(each.model_copy(update={"plan": losses}) for each in done.results)
    assert done.model_copy(update={"results": results}).chosen("low", "flat") == {"lr": 0.5}


def test_a_trial_without_a_number_is_not_chosen(trained, path):
    trained.metric_of = lambda run: float("nan") if run.settings.lr == 0.25 else 0.1
    assert run_study(STUDY, path).chosen("low", "flat") == {"lr": 0.5}


def test_a_line_says_all_of_a_run(trained, path):
    done = run_study(UNTUNED, path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == len(done.results) == 12
    ours = next(line for line in lines if (line["cell"], line["arm"]) == ("high", "ours"))
    assert ours["settings"]["seeds"] == [0]
    assert ours["settings"]["options"] == {"max_input_norm": 3.0}
    assert (ours["settings"]["epsilon"], ours["settings"]["lr"]) == (3.0, 0.5)
    assert ours["run"]["epochs"][-1]["metric"] == 0.7
    assert ours["run"]["seconds"] == [1.0, 2.0]
    assert ours["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"commit", "platform", "hardware", "format", "plan"} <= set(ours)
    read = StudyRecord.read(path)
    assert read.results == done.results
    assert [each.key for each in read.results] == [each.key for each in done.results]


@pytest.mark.parametrize("most", [0, 3, 16, 20])
def test_a_study_goes_on_where_it_was(most, trained, path):
    trained.most = most
    with pytest.raises(JobError, match="out of luck"):
        run_study(STUDY, path)
    trained.most = None
    done = run_study(STUDY, path)
    assert done.complete
    assert len(trained.runs) == 28  # none of them twice
    run_study(STUDY, path)
    assert len(trained.runs) == 28


def test_a_study_that_asks_for_more_or_other_runs_keeps_what_it_can(trained, path):
    run_study(UNTUNED, path)
    more = UNTUNED.replace(seeds=(0, 1, 2, 3))
    assert run_study(more, path).complete
    assert [run.settings.seed for run in trained.runs[12:]] == [3] * 4
    arms = {**UNTUNED.arms, "ours": {**UNTUNED.arms["ours"], "lr": 1.0}}
    assert run_study(UNTUNED.replace(arms=arms), path).complete
    assert {(run.arm, run.settings.lr) for run in trained.runs[16:]} == {("ours", 1.0)}
    assert len(trained.runs) == 22
    assert len(run_study(UNTUNED, path).asked) == 12  # what was measured before is still there
    assert len(trained.runs) == 22


def test_runs_of_other_versions_are_not_continued(trained, path):
    run_study(UNTUNED, path)
    whole = path.read_text()
    path.write_text(whole.replace('"torch":"', '"torch":"0.'))
    with pytest.raises(UsageError, match=r"^cannot resume from .*: torch 0\.2.* there, 2"):
        run_study(UNTUNED, path)
    path.write_text(whole.replace('"torch":"', '"torch":"0.', 1))
    with pytest.raises(UsageError, match="its runs are of several versions"):
        run_study(UNTUNED, path)
    path.write_text("{}\n")
    with pytest.raises(UsageError, match=r"is not a results file of opacus-bpclip ab --study"):
        run_study(UNTUNED, path)


def test_a_study_goes_on_on_another_machine(trained, path):
    run_study(UNTUNED, path)
    there = path.read_text().replace('"platform":"', '"platform":"elsewhere ', 1)
    path.write_text(there.replace("a machine", "another machine", 1))
    again = run_study(UNTUNED.replace(seeds=[0, 1, 2, 3]), path)
    assert len(again.asked) == 16
    assert len(trained.runs) == 16
    platforms = {each.platform for each in again.results}
    assert len(platforms) == 2
    held = StudyRecord.read(path)
    assert held.hardware == "another machine, a machine"
    assert set(held.platform.split(", ")) == platforms


def test_an_arm_that_cannot_train_is_noted_and_tried_again(trained, path, monkeypatch):
    monkeypatch.setattr(job.trial, "problem_of", lambda name, *_: "no" * (name == "flat"))
    done = run_study(UNTUNED, path)
    assert [each.note for each in done.published("low", "flat")] == ["no"] * 3
    assert {run.arm for run in trained.runs} == {"ours"}
    assert StudyJob(UNTUNED, processes=1).status(done) == 0
    monkeypatch.setattr(job.trial, "problem_of", lambda *_: "")
    assert len(run_study(UNTUNED, path).published("low", "flat")) == 3
    assert [run.arm for run in trained.runs[6:]] == ["flat"] * 6


def test_a_setting_that_cannot_train_says_nothing_of_the_arms_other_settings(
    trained, path, monkeypatch
):
    def problem_of(name, settings, *_):
        return "no" * (settings.options.get("max_input_norm") == 3.0)

    monkeypatch.setattr(job.trial, "problem_of", problem_of)
    done = run_study(STUDY, path)
    assert {each.note for each in done.results if each.run is None} == {"no"}
    assert done.chosen("low", "ours") == {"options": {"max_input_norm": "none"}}
    assert all(each.run for each in done.published("low", "ours"))


@pytest.fixture
def here(monkeypatch):
    """Train in this process; the search for the noise takes longer than all training here."""

    def call_here(function, calls, *, processes):
        yield from (function(*args) for args in calls)

    monkeypatch.setattr(job, "call_in_children", call_here)
    monkeypatch.setattr(privacy, "get_noise_multiplier", lambda **_: 1.5)


TINY = Study(
    seeds=[0],
    settings={"epochs": 1, "epsilon": 8.0, "batch_size": 512},
    cells={"digits": {}},
    arms={"flat": {}, "backprop": {}},
    tuning={
        "held_out": 0.25,
        "seeds": [5],
        "grid": {"flat": {"lr": [0.1]}, "backprop": {"lr": [0.2]}},
    },
)


def test_trials_are_judged_by_examples_that_they_do_not_train_on(here, monkeypatch):
    seen = []

    def look(name, seed, settings, plan, task, progress):
        sets = (task.train, task.test)
        images = [{image.numpy().tobytes() for image, _ in own} for own in sets]
        seen.append((settings.held_out, plan.train_examples, *images))
        return result(TINY_RUN).run

    monkeypatch.setattr(job, "train_seed", look)
    TINY_RUN = StudyRecord.new(TINY).runs[-1]  # noqa: N806
    measured(StudyJob(TINY, processes=1), Output(progress=False))
    (part, count, train, held_out), *_, (none, everything, whole, test) = seen
    assert (part, none, count, everything) == (0.25, 0, 1078, 1437)
    assert not train & held_out
    assert train | held_out == whole
    assert not whole & test


def test_a_study_end_to_end(here, tmp_path, capsys):
    path = tmp_path / "tiny.toml"
    path.write_text(
        "seeds = [0]\nbaseline = 'flat'\n[settings]\nepochs = 1\nepsilon = 8.0\nbatch_size = 512\n"
        "physical_batch_size = 256\n"
        "[cells.digits]\n[arms.flat]\n[arms.non-private]\n[arms.backprop]\n"
    )
    assert main(["ab", "--study", str(path), "--no-progress"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "digits: 1437 training and 360 test examples, model of 9,258 parameters" in out
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "tiny.jsonl",
        "tiny.png",
        "tiny.toml",
    ]
    lines = {each.arm: each for each in StudyRecord.read(tmp_path / "tiny.jsonl").results}
    assert lines["flat"].run.epsilon == lines["backprop"].run.epsilon > 0
    assert lines["non-private"].run.epsilon is None
    assert main(["ab", "--study", str(path), "--plot", "none"]) == 0
    assert capsys.readouterr().err == ""  # nothing is left to measure


def test_what_fails_in_training_is_a_note(here, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(job, "train_seed", fail)
    study = TINY.replace(tuning=None, arms={"flat": {}})
    done = measured(StudyJob(study, processes=1), Output(progress=False))
    (found,) = done.published("digits", "flat")
    assert found.failed
    assert found.note.startswith("RuntimeError: out of memory (raised at ")
    assert StudyJob(study, processes=1).status(done) == 1
