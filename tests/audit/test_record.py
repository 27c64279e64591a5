"""An audit as a file, as tables, and as a picture."""

import json
from dataclasses import replace

import pytest

from opacus_bpclip.audit import audit, job
from opacus_bpclip.audit.plot import draw
from opacus_bpclip.audit.report import render
from opacus_bpclip.audit.results import Audited, AuditRecord
from opacus_bpclip.audit.settings import Settings, tasks
from opacus_bpclip.jobs.errors import UsageError
from opacus_bpclip.jobs.processes import call_in_children
from opacus_bpclip.jobs.running import measured
from opacus_bpclip.jobs.settings import Output
from opacus_bpclip.jobs.tables import TERMINAL
from tests.audit.mechanisms import clipped, target
from tests.audit.test_mechanisms import spoiled_by_size

SETTINGS = Settings(case=("linear", "bias"), allocation=("joint",), bound=("exact",), trials=100)


@pytest.fixture(scope="module")
def verdicts():
    half = clipped(lambda rows: rows / 2)
    return {
        "pass": audit(target(), trials=100, searches=0),
        "violation": audit(target(clipped=spoiled_by_size), trials=100, searches=0),
        "inconclusive": audit(target(**half), trials=0, searches=0),
    }


def in_text(record):
    return render(record, TERMINAL)


def finished(verdicts, *names):
    made = AuditRecord.new(SETTINGS)
    for task, name in zip(made.wanted, names, strict=False):
        made = made.with_result(
            Audited(task=task, verdict=replace(verdicts[name], target=task.name))
        )
    return made


@pytest.mark.parametrize("name", ["pass", "violation", "inconclusive"])
def test_a_verdict_survives_its_file(name, verdicts, tmp_path):
    made = finished(verdicts, name)
    made.write(tmp_path / "a.json")
    assert repr(AuditRecord.read(tmp_path / "a.json")) == repr(made)
    (found,) = json.loads((tmp_path / "a.json").read_text())["results"]
    assert found["outcome"] == name
    for what in ("violations", "doubts"):
        assert found[what] == list(getattr(verdicts[name], what))


def test_several_processes_give_the_same_verdicts(monkeypatch):
    def one_after_the_other(*args, processes):
        assert processes == 2
        return call_in_children(*args, processes=1)

    monkeypatch.setattr(job, "call_in_children", one_after_the_other)
    small = SETTINGS.replace(case=("bias",), trials=0)
    apart, together = (
        measured(job.Audit(small, processes=number), Output(progress=False)) for number in (2, 1)
    )
    assert apart.asked == together.asked


def test_a_usage_error_that_shows_late_keeps_its_words(monkeypatch):
    def vanished(*args):
        raise UsageError("cannot import users_code")

    monkeypatch.setattr(job, "build", vanished)
    with pytest.raises(UsageError, match=r"^cannot import users_code$"):
        job.run_task(SETTINGS, tasks(SETTINGS)[0])


def test_the_report_of_a_pass(verdicts):
    text = in_text(finished(verdicts, "pass", "pass", "pass", "pass"))
    assert text.splitlines()[0] == (
        "noise multiplier 1, seed 0; statistical checks: 100 one-step trials in each world, alpha "
        "1e-06 for each target, delta 1e-05"
    )
    assert "\nlinear             2      4          1.0000    same     pass\n" in text
    assert "\nEmpirical epsilon:\n\ntarget" in text
    assert text.endswith("pass: no violation found in all 4 targets. This is evidence, not proof.")


def test_the_report_of_a_violation_says_what_it_is(verdicts):
    text = in_text(finished(verdicts, "violation", "pass"))
    assert "VIOLATION in 1 of 2 targets:\n\n- linear, joint, exact, mean: one example moves" in text
    assert "inf  1 differ  VIOLATION" in text


def test_the_report_of_an_audit_that_was_too_weak(verdicts):
    text = in_text(finished(verdicts, "inconclusive"))
    assert "0.5000    same  inconclusive" in text
    assert "Empirical epsilon" not in text
    assert "- linear, joint, exact, mean: inconclusive: the worst case reaches only 0.5 of" in text


def test_a_single_target_is_named_as_one(verdicts):
    assert "pass: no violation found in the target." in in_text(finished(verdicts, "pass"))


def test_without_trials_the_heading_promises_none(verdicts):
    bare = AuditRecord.new(SETTINGS.replace(trials=0))
    assert in_text(bare).startswith("noise multiplier 1, seed 0\n\n")


def test_the_plot_has_a_panel_for_each_statistical_audit(verdicts, tmp_path):
    for names in (("pass",), ("pass", "violation", "pass"), ("inconclusive",)):
        path = tmp_path / f"{len(names)}.png"
        draw(finished(verdicts, *names), path)
        assert path.read_bytes().startswith(b"\x89PNG")
