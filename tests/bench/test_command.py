"""Defaults, and a whole run."""

import gc
import json

import pytest

from opacus_bpclip.__main__ import main
from opacus_bpclip.bench import job, settings
from opacus_bpclip.bench.results import ArmResult, BenchRecord
from opacus_bpclip.bench.settings import ACCEPTANCE, ARMS, CASES, BenchOutput, Settings
from opacus_bpclip.jobs.errors import ChildError, UsageError, in_one_line
from tests.bench.tiny import CNN, CURVE, record, tiny


def test_cases_and_growth_curves_have_points_and_arms():
    assert [point.name for point in Settings().points] == list(ACCEPTANCE)
    assert Settings().arms == ARMS
    assert [point.name for point in Settings(case=("all",)).points] == list(CASES)
    how = Settings(growth="batch")
    sizes = (16, 64, 256, 1024, 4096)
    assert [point.key for point in how.points] == [("cnn26k", "batch", size) for size in sizes]
    backprop = ("joint-exact", "joint-weighted", "layerwise-exact", "layerwise-weighted")
    assert how.arms == ("non-private", *backprop, "hooks", "ghost")
    last = Settings(growth="length").points[-1]
    assert (last.key[2], last.case) == (512, CASES["transformer-512"])


def test_other_arms_and_rounds_are_added_to_what_the_same_machine_measured(tmp_path):
    path = tmp_path / "r.json"
    held = BenchRecord.new(Settings(case=("cnn26k",), rounds=3), results=(CNN,))
    held.write(path)
    added = job.Bench(Settings(case=("cnn26k", "mlp")), BenchOutput(from_json=path))
    assert added.begin().results == held.results
    assert added.todo(added.begin()) == added.begin().wanted
    held.model_copy(update={"hardware": "another CPU"}).write(path)
    with pytest.raises(UsageError, match=r"^cannot add .* --from-json: hardware another"):
        added.begin()


def call_here(function, *args, environment):
    """Stand in for a process of its own."""
    assert environment["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    gc.freeze()  # what pytest holds would not be there, and takes long to collect
    try:
        return function(*args)
    except Exception as error:
        raise ChildError(in_one_line(error)) from error
    finally:
        gc.unfreeze()


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(job, "call_in_child", call_here)
    for name in ("cnn26k", "mlp", "transformer"):
        monkeypatch.setitem(settings.CASES, name, tiny(name))


@pytest.mark.usefixtures("small")
def test_whole_run_and_what_is_made_of_its_file(tmp_path, capsys):
    data, page = tmp_path / "r.json", tmp_path / "page.md"
    page.write_text("<!-- bench-tables -->\n<!-- /bench-tables -->\n")
    options = ["--arms", "non-private", "joint-exact", "--rounds", "2"]
    assert main(["bench", "--case", "mlp", *options, "--json", str(data)]) == 0
    out, err = capsys.readouterr()
    assert "### MLP, batch 2, width 8, depth 1" in out
    assert "MLP, batch 2, width 8, depth 1: memory of joint-exact\n" in err
    arms = json.loads(data.read_text())["results"][0]["arms"]
    assert [len(own["seconds"]) for own in arms] == [2, 2]

    more = ["--case", "cnn26k", "--from-json", str(data), "--json", str(data)]
    assert main(["bench", *more, *options, "--no-progress"]) == 0
    assert capsys.readouterr().err == ""
    assert [own.point.name for own in BenchRecord.read(data).results] == ["mlp", "cnn26k"]

    tables = tmp_path / "tables.md"
    render = ["--from-json", str(data), "--markdown", str(tables), "--update", str(page)]
    render += ["--json", str(tmp_path / "copy.json")]
    assert main(["bench", *render]) == 0
    written = tables.read_text()
    assert written[written.index("1 CPU thread(s)") :].rstrip("\n") in page.read_text()
    assert (tmp_path / "copy.json").read_text() == data.read_text()


def test_growth_curves_of_a_results_file_become_a_picture(tmp_path, capsys):
    data, plot = tmp_path / "r.json", tmp_path / "p.svg"
    for held, status in ((record(CNN, *CURVE), 0), (record(CNN), 2)):
        held.write(data)
        assert main(["bench", "--from-json", str(data), "--plot", str(plot)]) == status
    assert plot.stat().st_size > 1000
    assert "error: --plot needs a growth curve: --growth, or a file" in capsys.readouterr().err


def test_processes_share_the_rounds_and_an_arm_fails_for_good(monkeypatch):
    found = iter([{"a": (1.0, 2.0), "b": (1.0, 2.0)}, {"a": (3.0,), "b": "broke"}, {"a": (4.0,)}])
    asked = []

    def note(_, arms, case, share, *, environment):
        asked.append((list(arms), share.rounds, share.limit, share.least_rounds))
        return next(found)

    monkeypatch.setattr(job, "call_in_child", note)
    results = {name: ArmResult(name, peaks=None) for name in "ab"}
    how = Settings(case=("mlp",), rounds=4, limit=9.0)
    job._add_times(results, "ab", how.points[0], how)
    assert asked == [(["a", "b"], 2, 3.0, 2), (["a", "b"], 1, 3.0, 2), (["a"], 1, 3.0, 2)]
    assert results["a"].seconds == (1.0, 2.0, 3.0, 4.0)
    assert results["b"] == ArmResult("b", failure="broke")


@pytest.mark.usefixtures("small")
def test_arms_that_run_are_timed_and_compiled_ones_apart_without_their_memory(monkeypatch):
    calls = []

    def note(function, *args, environment):
        calls.append((function.__name__, args[0]))
        # A peak is seen where memory is given back, a time is steady where it is not.
        assert ("MALLOC_TRIM_THRESHOLD_" in environment) == (function is job.step_times)
        if args[0] == "ew":
            raise ChildError("no rule for this")
        return dict.fromkeys(args[0], (1.0, 1.0)) if function is job.step_times else (1,)

    monkeypatch.setattr(job, "call_in_child", note)
    names = ("non-private", "joint-exact", "ew", "non-private-compiled", "joint-exact-compiled")
    how = Settings(case=("mlp",), arms=names, rounds=2, processes=1)
    own = job.compare(how.points[0], how)
    assert calls == [
        ("peak_memory", "non-private"),
        ("peak_memory", "joint-exact"),
        ("peak_memory", "ew"),
        ("step_times", ["non-private", "joint-exact"]),
        ("step_times", ["non-private-compiled", "joint-exact-compiled"]),
    ]
    assert [arm.peaks for arm in own.arms] == [(1,), (1,), (), None, None]
    assert own.arms[2] == ArmResult("ew", failure="no rule for this")
