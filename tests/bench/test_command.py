"""Options, their defaults, the one line that each mistake is answered by, and a whole run."""

import json

import pytest
from opacus_bpclip.cli import build_parser, main
from opacus_bpclip.jobs.child import in_one_line

from opacus_bpclip.bench import command, job, settings
from opacus_bpclip.bench import record as records
from opacus_bpclip.bench.results import ArmResult
from opacus_bpclip.bench.settings import ACCEPTANCE, ARMS, CASES, Output, Settings, points
from opacus_bpclip.jobs.errors import ChildError
from tests.bench.tiny import CNN, CURVE, record, tiny


def what(*options):
    """Return what a command line measures, and how."""
    given = vars(build_parser().parse_args(["bench", *options]))
    names = ("run", "command", "progress", "json", "from_json", "plot")
    output = {name: given.pop(name) for name in names if name in given}
    kept = {name: output[name] for name in ("from_json", "plot") if name in output}
    return command._what(given, Output(**kept))


def error_of(capsys, *options):
    assert main(["bench", "--no-progress", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err.removeprefix("opacus-bpclip bench: error: ").rstrip("\n")


def test_defaults_are_the_acceptance_cases_with_every_arm():
    todo, how = what()
    assert [point.name for point in todo] == list(ACCEPTANCE)
    assert how == Settings(arms=ARMS, rounds=40, limit=60.0, threads=1, device="cpu")


def test_every_option_reaches_the_settings():
    options = "--case lstm text --arms non-private ghost --rounds 3 --limit 2 --threads 2"
    options += " --processes 4"
    todo, how = what(*options.split())
    assert [(point.name, point.axis) for point in todo] == [("lstm", None), ("text", None)]
    assert how == Settings(("non-private", "ghost"), rounds=3, limit=2.0, threads=2, processes=4)
    assert [point.name for point in what("--case", "all")[0]] == list(CASES)


def test_growth_curve():
    todo, how = what("--growth", "batch")
    assert [point.key for point in todo] == [
        ("cnn26k", "batch", size) for size in (16, 64, 256, 1024, 4096)
    ]
    assert how.arms == (
        "non-private",
        "joint-exact",
        "joint-weighted",
        "layerwise-exact",
        "layerwise-weighted",
        "hooks",
        "ghost",
    )
    (last,) = [point for point in points((), "length") if point.key[2] == 512]
    assert last.case == CASES["transformer-512"]


def test_a_results_file_alone_is_only_rendered():
    assert what("--from-json", "r.json")[0] == []
    assert [p.name for p in what("--from-json", "r.json", "--case", "mlp")[0]] == ["mlp"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            "--case resnet",
            "--case must be one of cnn26k, resnet18-gn, transformer, mlp, cnn26k-2048, "
            "transformer-512, text, lstm, lora, not 'resnet'",
        ),
        ("--case mlp mlp", "--case must not name anything twice: mlp mlp"),
        ("--growth size", "--growth must be one of batch, width, depth, length, not 'size'"),
        ("--growth batch --case mlp", "--growth has a case of its own: leave --case out"),
        ("--arms ghost", "--arms ghost needs non-private, which its ratios are to"),
        (
            "--arms non-private joint-exact-compiled",
            "--arms joint-exact-compiled needs non-private-compiled, which its ratios are to",
        ),
        ("--rounds 0", "--rounds must be at least 1, not 0"),
        ("--processes 0", "--processes must be at least 1, not 0"),
        ("--threads 0", "--threads must be at least 1, not 0"),
        ("--limit -1", "--limit must be a number of seconds at least 0, not -1.0"),
        ("--limit nan", "--limit must be a number of seconds at least 0, not nan"),
        ("--device tpu", "--device must be one of cpu, cuda, not 'tpu'"),
        ("--plot p.png", "--plot draws growth curves: it needs --growth or --from-json"),
        ("--from-json r.json --rounds 3", "--rounds with --from-json needs --case or --growth"),
        (
            "--growth batch --plot p.c",
            "--plot p.c: name a file that ends in .png, .pdf or .svg",
        ),
        (
            "--json absent/r",
            "--json absent/r cannot be written: No such file or directory",
        ),
        (
            "--update absent.md",
            "--update absent.md: [Errno 2] No such file or directory: 'absent.md'",
        ),
        (
            "--from-json absent",
            "absent is not a results file of opacus-bpclip bench (FileNotFoundError: [Errno 2] No "
            "such file or directory: 'absent')",
        ),
    ],
)
def test_wrong_usage(options, text, capsys):
    assert error_of(capsys, *options.split()) == text


def test_missing_matplotlib(capsys, monkeypatch):
    monkeypatch.setattr("opacus_bpclip.jobs.extras.find_spec", lambda name: None)
    assert error_of(capsys, "--growth", "batch", "--plot", "p.png") == (
        'a plot needs matplotlib, which is not installed: pip install "opacus-bpclip[ab]"'
    )


def test_cuda_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(job.torch.cuda, "is_available", lambda: False)
    assert error_of(capsys, "--device", "cuda") == "--device cuda: torch finds no GPU here"


def test_interruption_has_its_own_status(monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_run", interrupt)
    assert main(["bench"]) == 130
    assert capsys.readouterr().err == "opacus-bpclip bench: interrupted\n"


def call_here(function, *args, environment):
    """Stand in for a process of its own."""
    assert environment["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    try:
        return function(*args)
    except Exception as error:
        raise ChildError(in_one_line(error)) from error


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
    assert "mlp (batch 2, width 8, depth 1): memory of joint-exact\n" in err
    arms = json.loads(data.read_text())["comparisons"][0]["arms"]
    assert [len(own["seconds"]) for own in arms.values()] == [2, 2]

    more = ["--case", "cnn26k", "--from-json", str(data), "--json", str(data)]
    assert main(["bench", *more, *options, "--no-progress"]) == 0
    assert capsys.readouterr().err == ""
    assert [own.point.name for own in records.read(data).comparisons] == ["mlp", "cnn26k"]

    tables = tmp_path / "tables.md"
    render = ["--from-json", str(data), "--markdown", str(tables), "--update", str(page)]
    render += ["--json", str(tmp_path / "copy.json")]
    assert main(["bench", *render]) == 0
    assert tables.read_text().rstrip("\n") in page.read_text()
    assert (tmp_path / "copy.json").read_text() == data.read_text()


def test_plot_of_a_results_file(tmp_path, capsys):
    data, plot = tmp_path / "r.json", tmp_path / "p.png"
    records.write(record(CNN, *CURVE), data)
    assert main(["bench", "--from-json", str(data), "--plot", str(plot)]) == 0
    assert plot.stat().st_size > 0


@pytest.mark.usefixtures("small")
def test_arm_that_cannot_run_is_told_and_not_timed(monkeypatch):
    from opacus_bpclip.bench import measure

    make = measure.make_step

    def failing(arm, *args):
        if arm == "ew":
            raise RuntimeError("no rule for this")
        return make(arm, *args)

    monkeypatch.setattr(measure, "make_step", failing)
    how = Settings(("non-private", "ew"), rounds=2)
    (point,) = points(("mlp",), None)
    base, broken = job.compare(point, how).arms
    assert len(base.seconds) == 2
    assert broken.seconds == ()
    assert broken.failure.startswith("RuntimeError: no rule for this")


def test_processes_share_the_rounds_and_an_arm_fails_for_good(monkeypatch):
    found = iter([{"a": (1.0, 2.0), "b": (1.0, 2.0)}, {"a": (3.0,), "b": "broke"}, {"a": (4.0,)}])
    asked = []

    def note(_, arms, case, share, *, environment):
        asked.append((list(arms), share.rounds, share.limit, share.least_rounds))
        return next(found)

    monkeypatch.setattr(job, "call_in_child", note)
    results = {name: ArmResult(name, peaks=None) for name in "ab"}
    (point,) = points(("mlp",), None)
    job._add_times(results, "ab", point, Settings(rounds=4, limit=9.0))
    assert asked == [(["a", "b"], 2, 3.0, 2), (["a", "b"], 1, 3.0, 2), (["a"], 1, 3.0, 2)]
    assert results["a"].seconds == (1.0, 2.0, 3.0, 4.0)
    assert results["b"] == ArmResult("b", failure="broke")


@pytest.mark.usefixtures("small")
def test_compiled_arms_are_timed_apart_and_their_memory_is_not(monkeypatch):
    calls = []

    def note(function, *args, environment):
        calls.append((function.__name__, args[0]))
        # A peak is seen where memory is given back, a time is steady where it is not.
        assert ("MALLOC_TRIM_THRESHOLD_" in environment) == (function is job.step_times)
        return dict.fromkeys(args[0], (1.0, 1.0)) if function is job.step_times else [1]

    monkeypatch.setattr(job, "call_in_child", note)
    names = ("non-private", "joint-exact", "non-private-compiled", "joint-exact-compiled")
    (point,) = points(("mlp",), None)
    own = job.compare(point, Settings(names, rounds=2, processes=1))
    assert calls == [
        ("peak_memory", "non-private"),
        ("peak_memory", "joint-exact"),
        ("step_times", ["non-private", "joint-exact"]),
        ("step_times", ["non-private-compiled", "joint-exact-compiled"]),
    ]
    assert [arm.peaks for arm in own.arms] == [(1,), (1,), None, None]
