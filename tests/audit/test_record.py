"""An audit as a file that can be continued, as tables, and as a picture."""

import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from opacus_bpclip.audit.record import Record

from opacus_bpclip.audit import audit, job
from opacus_bpclip.audit.plot import draw
from opacus_bpclip.audit.report import page, render
from opacus_bpclip.audit.settings import Output, Settings, tasks
from opacus_bpclip.audit.verdict import verdict_from_dict
from opacus_bpclip.jobs import environment
from opacus_bpclip.jobs.errors import JobError, UsageError
from tests.audit.mechanisms import Gaussian, target

SETTINGS = Settings(cases=("linear", "bias"), allocations=("joint",), bounds=("exact",), trials=100)


class Half(Gaussian):
    def clipped(self):
        return super().clipped() / 2


class Spoiled(Gaussian):
    def clipped(self):
        return super().clipped() * (float("nan") if (self.rows.abs() > 1e3).any() else 3)


@pytest.fixture(scope="module")
def verdicts():
    return {
        "pass": audit(target(), trials=100, searches=0),
        "violation": audit(target(Spoiled), trials=100, searches=0),
        "asleep": audit(target(Half), trials=0, searches=0),
    }


@pytest.fixture
def stubbed(monkeypatch, verdicts):
    """Stand in for audits; remember what was asked for."""
    asked = []

    def run(settings, task):
        asked.append(task.name)
        return replace(verdicts["pass"], target=task.name)

    monkeypatch.setattr(job, "run_task", run)
    return asked


def finished(verdicts, *names):
    planned = tuple(tasks(SETTINGS))
    made = Record(SETTINGS, planned)
    for task, name in zip(planned, names, strict=False):
        made = made.with_verdict(task, replace(verdicts[name], target=task.name))
    return made


@pytest.mark.parametrize("name", ["pass", "violation", "asleep"])
def test_a_verdict_survives_its_file(name, verdicts):
    verdict = verdicts[name]
    text = json.dumps(verdict.as_dict(), allow_nan=False)
    assert repr(verdict_from_dict(json.loads(text))) == repr(verdict)
    assert json.loads(text)["outcome"] == verdict.outcome == name


def test_progress_and_file_after_every_target(stubbed, tmp_path, capsys):
    path = tmp_path / "a.json"
    done = job.run_audits(SETTINGS, Output(json=path))
    names = [task.name for task in tasks(SETTINGS)]
    assert stubbed == names
    assert done.is_complete
    assert capsys.readouterr().err.splitlines()[0] == "1 of 4  linear, joint, exact, mean: pass"
    held = json.loads(path.read_text())
    assert held["complete"]
    assert [found["task"]["name"] for found in held["verdicts"]] == names
    assert held["settings"]["trials"] == 100
    assert set(held["versions"]) >= {"torch", "opacus", "scipy"}


def test_a_continued_audit_does_only_what_is_left(stubbed, tmp_path):
    path = tmp_path / "a.json"
    few = replace(SETTINGS, cases=("linear",))
    job.run_audits(few, Output(json=path, progress=False))
    stubbed.clear()
    done = job.run_audits(SETTINGS, Output(json=path, resume=True, progress=False))
    assert stubbed == ["bias, joint, exact, mean", "bias, joint, exact, sum"]
    assert len(done.in_order) == 4
    # What is not asked for again is left out.
    less = job.run_audits(few, Output(json=path, resume=True, progress=False))
    assert len(less.in_order) == 2


def test_nothing_to_continue_from_starts_afresh(stubbed, tmp_path):
    output = Output(json=tmp_path / "a.json", resume=True, progress=False)
    assert job.run_audits(SETTINGS, output).is_complete


def test_an_audit_of_other_settings_is_not_continued(stubbed, tmp_path):
    path = tmp_path / "a.json"
    job.run_audits(SETTINGS, Output(json=path, progress=False))
    with pytest.raises(UsageError, match=r"cannot resume from .*: seed 0 there, 1 now$"):
        job.run_audits(replace(SETTINGS, seed=1), Output(json=path, resume=True))


def test_another_file_is_not_continued(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("{}")
    with pytest.raises(UsageError, match="is not a results file of opacus-bpclip audit"):
        job.run_audits(SETTINGS, Output(json=path, resume=True))


def test_several_processes_give_the_same_verdicts():
    small = replace(SETTINGS, cases=("bias",), trials=0)
    apart = job.run_audits(small, Output(processes=2, progress=False))
    together = job.run_audits(small, Output(processes=1, progress=False))
    assert apart.in_order == together.in_order


def test_a_process_that_dies_is_one_message(monkeypatch):
    class Pool:
        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            return None

        def submit(self, *args):
            future = job.Future()
            future.set_exception(job.BrokenProcessPool("out of memory"))
            return future

        def shutdown(self, **options):
            assert options == {"wait": False, "cancel_futures": True}

    monkeypatch.setattr(job, "ProcessPoolExecutor", Pool)
    with pytest.raises(JobError, match=r"^an audit's process died: out of memory$"):
        job.run_audits(SETTINGS, Output(processes=2))


def test_a_worker_dies_with_its_parent(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(job, "parent_process", lambda: SimpleNamespace(join=lambda: None))
    monkeypatch.setattr(job.os, "_exit", lambda status: ended.set() if status == 1 else None)
    job._end_with_parent()
    assert ended.wait(timeout=60)


def test_a_usage_error_that_shows_late_keeps_its_words(monkeypatch):
    def vanished(*args):
        raise UsageError("cannot import users_code")

    monkeypatch.setattr(job, "build", vanished)
    with pytest.raises(UsageError, match=r"^cannot import users_code$"):
        job.run_task(SETTINGS, tasks(SETTINGS)[0])


def test_the_report_of_a_pass(verdicts):
    text = render(finished(verdicts, "pass", "pass", "pass", "pass"))
    assert text.splitlines()[0] == (
        "noise multiplier 1, seed 0; statistical checks: 100 one-step trials in each world, alpha "
        "1e-06 for each target, delta 1e-05"
    )
    assert "\nlinear             2      4          1.0000    same     pass\n" in text
    assert "\nEmpirical epsilon:\n\ntarget" in text
    assert text.endswith("pass: no violation found in all 4 targets. This is evidence, not proof.")


def test_the_report_of_a_violation_says_what_it_is(verdicts):
    text = render(finished(verdicts, "violation", "pass"))
    assert "VIOLATION in 1 of 2 targets:\n\n- linear, joint, exact, mean: one example moves" in text
    assert "inf  1 differ  VIOLATION" in text


def test_the_report_of_an_audit_asleep(verdicts):
    text = render(finished(verdicts, "asleep"))
    assert "0.5000    same   asleep" in text
    assert "Empirical epsilon" not in text
    assert "- linear, joint, exact, mean: asleep: the worst case reaches only 0.5 of the" in text


def test_a_single_target_is_named_as_one(verdicts):
    assert "pass: no violation found in the target." in render(finished(verdicts, "pass"))


def test_the_page_says_how_it_was_made(verdicts, monkeypatch):
    text = page(finished(verdicts, "pass"), ["opacus-bpclip", "audit", "--json", "a b.json"])
    assert text.startswith("# Audit report\n\n    opacus-bpclip audit --json 'a b.json'\n\nCommit ")
    assert "| target | steps | trials | mu | bound |" in text
    assert "**Verdict.** pass: " in text


def test_without_trials_the_heading_promises_none(verdicts):
    bare = Record(replace(SETTINGS, trials=0), ())
    assert render(bare).startswith("noise multiplier 1, seed 0\n\n")


def test_the_plot_has_a_panel_for_each_statistical_audit(verdicts, tmp_path):
    for names in (("pass",), ("pass", "violation", "pass"), ("asleep",)):
        path = tmp_path / f"{len(names)}.png"
        draw(finished(verdicts, *names), path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_commit_is_known_in_a_checkout_and_nowhere_else(monkeypatch, tmp_path):
    assert environment.commit() is None or len(environment.commit().split()[0]) >= 7
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "a" / "b.py"))
    assert environment.commit() is None
