"""Results files: whole after every result, read again, continued only where nothing changed."""

import json
from dataclasses import dataclass

import pytest

from opacus_bpclip.ab import job as ab
from opacus_bpclip.ab.settings import ARMS
from opacus_bpclip.ab.settings import Settings as Comparison
from opacus_bpclip.audit import audit
from opacus_bpclip.audit import job as audits
from opacus_bpclip.audit.results import Audited
from opacus_bpclip.audit.settings import Settings as Audit
from opacus_bpclip.bench import job as bench
from opacus_bpclip.bench.settings import BenchOutput
from opacus_bpclip.bench.settings import Settings as Bench
from opacus_bpclip.jobs import environment
from opacus_bpclip.jobs.errors import JobError, UsageError
from opacus_bpclip.jobs.running import measured, page, run
from opacus_bpclip.jobs.settings import Output
from tests.ab.results import PLAN, arm_result
from tests.audit.mechanisms import target
from tests.bench.tiny import CNN


class Measurements:
    """Stand in for what is measured; remember what was asked for, and fail where told to."""

    def __init__(self, result, key_of):
        self.result, self.key_of = result, key_of
        self.asked, self.fail_at = [], None

    def __call__(self, *args, **options):
        key = self.key_of(args)
        if key == self.fail_at:
            raise JobError("out of luck")
        self.asked.append(key)
        return self.result(key)


@dataclass
class Case:
    """A command with something to measure, and what stands in for measuring it."""

    make: type
    settings: object
    less: dict
    other: dict
    difference: str
    measurements: Measurements

    def job(self, **changes):
        settings = self.settings.replace(**changes)
        return (
            self.make(settings, BenchOutput()) if self.make is bench.Bench else self.make(settings)
        )


def ab_case(monkeypatch):
    stub = Measurements(arm_result, lambda args: args[1])
    monkeypatch.setattr(ab, "call_in_child", stub)
    monkeypatch.setattr(ab, "task_of", lambda settings, objects: None)
    monkeypatch.setattr(ab, "plan_for", lambda settings, task: PLAN)
    monkeypatch.setattr(ab.trial, "check", lambda task, settings: None)
    monkeypatch.setattr(ab.trial, "problem_of", lambda *args: "")
    settings = Comparison(epochs=2, seeds=(0, 1), arms=ARMS[:3])
    less, other = {"arms": ARMS[:2], "data_root": "elsewhere"}, {"lr": 0.2, "seeds": (0, 1, 2)}
    difference = "seeds [0, 1] there, [0, 1, 2] now; lr 0.1 there, 0.2 now"
    return Case(ab.Comparison, settings, less, other, difference, stub)


def audit_case(monkeypatch):
    verdict = audit(target(), trials=0, searches=0)
    stub = Measurements(lambda task: Audited(task=task, verdict=verdict), lambda args: args[1])
    monkeypatch.setattr(audits, "run_task", stub)
    few = {"allocation": ("joint",), "bound": ("exact",), "loss_reduction": ("mean",)}
    settings = Audit(case=("linear", "bias", "conv"), **few)
    less, other = {"case": ("linear", "bias")}, {"seed": 1}
    return Case(audits.Audit, settings, less, other, "seed 0 there, 1 now", stub)


def bench_case(monkeypatch):
    stub = Measurements(lambda point: CNN.model_copy(update={"point": point}), lambda args: args[0])
    monkeypatch.setattr(bench, "compare", stub)
    settings = Bench(case=("cnn26k", "mlp", "text"), arms=[own.arm for own in CNN.arms])
    less = {"case": ("cnn26k", "mlp")}
    other = {"rounds": 3, "limit": 1.0, "threads": 2}
    difference = "rounds 40 there, 3 now; limit 60.0 there, 1.0 now; threads 1 there, 2 now"
    return Case(bench.Bench, settings, less, other, difference, stub)


@pytest.fixture(params=[ab_case, audit_case, bench_case], ids=["ab", "audit", "bench"])
def case(request, monkeypatch):
    return request.param(monkeypatch)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.json"


def test_a_run_is_kept_after_every_result_and_read_again(case, path, capsys):
    done = measured(case.job(), Output(data=path))
    assert len(case.measurements.asked) == len(done.asked) == 3
    assert type(done).read(path) == done
    facts = json.loads(path.read_text())
    assert (facts["complete"], facts["format"], facts["seeds"]) == (True, 3, list(done.seeds))
    assert facts["settings"] == json.loads(case.settings.model_dump_json())
    for package in ("python", "torch", "opacus", "opacus_bpclip", "numpy", "torchvision"):
        assert facts["versions"][package]
    assert facts["platform"]
    assert facts["hardware"]
    assert [line[:8] for line in capsys.readouterr().err.splitlines()] == [
        "1 of 3  ",
        "2 of 3  ",
        "3 of 3  ",
    ]
    assert list(path.parent.iterdir()) == [path]


def test_what_is_finished_outlives_a_failure_and_is_resumed(case, path):
    last = measured(case.job(), Output(progress=False)).asked[-1]
    asked, case.measurements.asked = case.measurements.asked, []
    case.measurements.fail_at = asked[2]
    with pytest.raises(JobError, match="out of luck"):
        measured(case.job(), Output(data=path, progress=False))
    facts = json.loads(path.read_text())
    assert (facts["complete"], len(facts["results"])) == (False, 2)
    case.measurements.asked, case.measurements.fail_at = [], None
    done = measured(case.job(), Output(data=path, resume=True, progress=False))
    assert case.measurements.asked == asked[2:]
    assert done.complete
    assert done.asked[-1] == last
    measured(case.job(), Output(data=path, progress=False))
    assert case.measurements.asked == [*asked[2:], *asked]  # without --resume, all of it again


def test_more_may_be_asked_for_when_a_run_is_continued(case, path):
    resumed = Output(data=path, resume=True, progress=False)
    assert len(measured(case.job(**case.less), resumed).results) == 2  # there is no file yet
    case.measurements.asked.clear()
    assert measured(case.job(), resumed).complete
    assert len(case.measurements.asked) == 1
    less = measured(case.job(**case.less), resumed)
    assert (len(less.asked), len(less.results), less.complete) == (2, 3, True)


# An audit is not continued at another commit.
@pytest.mark.parametrize("case_of", [ab_case, bench_case])
def test_a_record_names_every_commit_that_it_was_measured_with(case_of, path, monkeypatch):
    case = case_of(monkeypatch)

    def run_at(commit, **changes):
        monkeypatch.setattr("opacus_bpclip.jobs.record.commit", lambda: commit)
        resumed = Output(data=path, resume=True, progress=False)
        return measured(case.job(**changes), resumed).commit

    assert run_at("abc", **case.less) == "abc"
    assert run_at("def", **case.less) == "abc"  # nothing was left to measure
    assert run_at("def") == run_at("abc") == "abc, def"


def test_results_of_other_settings_are_not_continued(case, path):
    measured(case.job(), Output(data=path, progress=False))
    with pytest.raises(UsageError) as caught:
        measured(case.job(**case.other), Output(data=path, resume=True))
    assert str(caught.value) == f"cannot resume from {path}: {case.difference}"


def test_a_point_without_an_arm_that_is_asked_for_is_not_done(monkeypatch, path):
    case = bench_case(monkeypatch)
    held = case.settings.arms
    measured(case.job(case=("mlp",)), Output(data=path, progress=False))
    resumed = Output(data=path, resume=True, progress=False)
    fewer = measured(case.job(case=("mlp",), arms=held[:2]), resumed)
    assert (fewer.complete, len(case.measurements.asked)) == (True, 1)
    more = (*held, "functorch")
    with pytest.raises(UsageError) as caught:
        measured(case.job(case=("mlp",), arms=more), resumed)
    difference = f"arms of mlp {' '.join(held)} there, {' '.join(more)} now"
    assert str(caught.value) == f"cannot resume from {path}: {difference}"
    # What is asked for of another point does not concern this one.
    assert measured(case.job(case=("text",), arms=more), resumed).complete
    assert len(case.measurements.asked) == 2


@pytest.mark.parametrize("name", ["torch", "opacus_bpclip"])
def test_results_of_other_versions_are_not_continued(name, case, path):
    measured(case.job(), Output(data=path, progress=False))
    facts = json.loads(path.read_text())
    facts["versions"][name] = "0.0"
    facts["platform"] = "another one"
    path.write_text(json.dumps(facts))
    with pytest.raises(
        UsageError, match=rf"^cannot resume from .*: {name} 0\.0 there, \S+ now; pl"
    ):
        measured(case.job(), Output(data=path, resume=True))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"settings": 1, "format": 3}'])
def test_another_file_is_not_continued(text, case, path):
    path.write_text(text)
    with pytest.raises(UsageError, match=r"it is not a results file of opacus-bpclip (ab|aud|ben)"):
        measured(case.job(), Output(data=path, resume=True))


def test_an_older_format_is_not_continued_whatever_its_settings(case, path):
    measured(case.job(), Output(data=path, progress=False))
    facts = json.loads(path.read_text()) | {"format": 2, "settings": {"upstream": "clip"}}
    path.write_text(json.dumps(facts))
    with pytest.raises(UsageError, match=r"\(format: must be 3\)"):
        measured(case.job(), Output(data=path, resume=True))


def test_a_page_says_how_it_was_made(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", "audit", "--json", "a b.json"])
    files = {"markdown": tmp_path / "a.md", "plot": None, "data": tmp_path / "a.json"}
    assert run(case.job(), Output(**files, progress=False)) == 0
    text = files["markdown"].read_text()
    assert text.startswith(f"# {case.make.view.title}\n\n    opacus-bpclip audit --json 'a b.json'")
    assert "\n\nCommit " in text
    assert "|---|---|" in text
    made = f"page: {files['markdown']}\ndata: {files['data']}\n"
    assert capsys.readouterr().out.endswith(made)
    assert page(case.job(), case.make.begin(case.job())).startswith("# ")


def test_the_commit_is_known_in_a_checkout_and_nowhere_else(monkeypatch, tmp_path):
    now = environment.commit.__wrapped__
    assert now() is None or len(now().split()[0]) >= 7
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "a" / "b.py"))
    assert now() is None
