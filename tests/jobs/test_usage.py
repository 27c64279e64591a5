"""Options, their defaults, and the one line that each mistake is answered by, in every command."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from opacus_bpclip.__main__ import app, main
from opacus_bpclip.audit.settings import CASE_NAMES
from opacus_bpclip.jobs import running
from opacus_bpclip.jobs.errors import JobError, UsageError

MEASURING = ["ab", "audit", "bench"]
ABSENT = "No such file or directory"
PIP = 'which is not installed: pip install "opacus-bpclip[ab]"'


def parsed(line):
    """Return the options of a command line, by name."""
    _, bound, _ = app.parse_args(line, exit_on_error=False, print_error=False)
    bound.apply_defaults()
    return {name: value for group in bound.arguments.values() for name, value in group}


def error_of(capsys, line, lines=1):
    """Run a command line that must fail as wrong usage, and return what it says."""
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == lines
    command = line.split()[0]
    text = err.removeprefix(f"opacus-bpclip {command}: error: ").rstrip("\n")
    return text.removesuffix(f" (see opacus-bpclip {command} --help)")


@pytest.mark.parametrize("command", MEASURING)
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--resume", "--resume needs --json FILE, the file to continue from"),
        ("--json absent/a.json", f"--json absent/a.json cannot be written: {ABSENT}"),
        ("--markdown absent/a.md", f"--markdown absent/a.md cannot be written: {ABSENT}"),
        ("--json .", "--json . cannot be written: Is a directory"),
        ("--json a --markdown ./a", "--json and --markdown both name a: give each its own file"),
        ("--plot a.png --json a.png", "--plot and --json both name a.png: give each its own file"),
        ("--plot a.doc", "--plot a.doc: name a file that ends in .png, .pdf or .svg"),
        ("--plot absent/a.png", f"--plot absent/a.png cannot be written: {ABSENT}"),
        ("--json", "Command"),
        ("--bogus 3", "Unknown option: --bogus."),
        ("more", "Unused Tokens: ['more']."),
    ],
)
def test_mistakes_with_files_and_options(command, options, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rest = {"ab": "--plot none", "audit": "", "bench": "--growth batch"}[command]
    given = f"{rest} {options}" if "--plot" not in options or command != "ab" else options
    assert error_of(capsys, f"{command} {given}").startswith(text)
    assert list(tmp_path.iterdir()) == []


POSITIVE = "input should be greater than 0"
FINITE = "input should be a finite number"
COUNT = "input should be greater than or equal to 1"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("ab --epsilon 0", f"--epsilon 0: {POSITIVE}"),
        ("ab --epsilon nan", f"--epsilon nan: {FINITE}"),
        ("ab --epsilon inf", f"--epsilon inf: {FINITE}"),
        ("ab --epsilon 101", "--epsilon 101: input should be less than or equal to 100"),
        ("ab --delta 1", "--delta 1: input should be less than 1"),
        ("ab --delta nan", f"--delta nan: {FINITE}"),
        ("ab --momentum 1", "--momentum 1: input should be less than 1"),
        ("ab --lr -1", f"--lr -1: {POSITIVE}"),
        ("ab --max-grad-norm 0", f"--max-grad-norm 0: {POSITIVE}"),
        ("ab --max-input-norm nan", f"--max-input-norm nan: {FINITE}"),
        ("ab --max-input-norm all", "--max-input-norm all: input should be a valid number, unable"),
        ("ab --epochs 0", f"--epochs 0: {COUNT}"),
        ("ab --epochs many", "--epochs many: input should be a valid integer, unable to parse"),
        ("ab --batch-size -3", f"--batch-size -3: {COUNT}"),
        ("ab --threads 0", f"--threads 0: {COUNT}"),
        (
            "ab --dataset imagenet",
            "--dataset imagenet: input should be 'digits', 'mnist', 'fashion-mnist' or 'cifar10'",
        ),
        ("ab --bound loose", "--bound loose: input should be 'product', 'weighted' or 'exact'"),
        ("ab --allocation joint", "--allocation joint: input should be 'equal' or 'dimension'"),
        ("ab --accountant zcdp", "--accountant zcdp: input should be 'prv', 'rdp' or 'gdp'"),
        (
            "ab --arms ghostly",
            "--arms ghostly: input should be 'non-private', 'flat', ",
        ),
        ("ab --arms flat flat", "--arms flat flat: must not name anything twice"),
        ("ab --seeds 1 1", "--seeds 1 1: must not name anything twice"),
        ("ab --seeds -1", "--seeds -1: input should be greater than or equal to 0"),
        ("ab --seeds", "--seeds: tuple should have at least 1 item after validation, not 0"),
        ("ab --bound product", "--bound product needs a number for --max-input-norm"),
        ("ab --lr 0 --epochs 0", f"--epochs 0: {COUNT}; --lr 0: {POSITIVE}"),
        (
            "ab --plot none --batch-size 1438",
            "--batch-size 1438 is larger than the training set of digits (1437 examples)",
        ),
        (
            "ab --plot none --epsilon 1e-9",
            "no noise multiplier reaches --epsilon 1e-09 at --delta 1e-05 in 240 steps (The "
            "privacy budget is too low.)",
        ),
        ("audit --case dense", f"--case dense: input should be '{CASE_NAMES[0]}', 'sequence-l"),
        ("audit --allocation fair", "--allocation fair: input should be 'joint', 'equal' or"),
        ("audit --loss-reduction max", "--loss-reduction max: input should be 'mean' or 'sum'"),
        ("audit --case conv conv", "--case conv conv: must not name anything twice"),
        ("audit --noise-multiplier 0", f"--noise-multiplier 0: {POSITIVE}"),
        ("audit --max-input-norm none", "--bound product needs a number for --max-input-norm"),
        ("audit --max-input-norm all", "--max-input-norm all: input should be a valid number"),
        ("audit --alpha 0", f"--alpha 0: {POSITIVE}"),
        ("audit --trials 5", "--trials 5: must be 0 or at least 100"),
        ("audit --trials -1", "--trials -1: must be 0 or at least 100"),
        ("audit --seed -1", "--seed -1: input should be greater than or equal to 0"),
        ("audit --processes 0", f"--processes 0: {COUNT}"),
        ("audit --target a:b --model c:d", "--target and --model are two ways to name what is au"),
        ("audit --target a:b --case bias", "--case names built-in cases: leave it out for --targ"),
        ("audit --model a:b --input 3 --case bias", "--case names built-in cases: leave it out f"),
        ("audit --plot p.png --trials 0", "--plot draws the trials' scores: it needs --trials ab"),
        ("audit --model a:b", "--model needs --input, an example's shape or MODULE:FUNCTION"),
        ("audit --input 4", "--loss, --input and --vocabulary go with --model MODULE:FACTORY"),
        ("audit --loss a:b", "--loss, --input and --vocabulary go with --model MODULE:FACTORY"),
        ("audit --vocabulary 3", "--loss, --input and --vocabulary go with --model MODULE:FACTORY"),
        (
            "audit --model a:b --input 4y5",
            "--input must be a shape such as 3x8x8, or MODULE:FUNCTION, not '4y5'",
        ),
        ("audit --model a:b --input 0", "--input must be a shape such as 3x8x8, or MODULE:FUNCTI"),
        (
            "audit --model a:b --input 4 --loss c:d",
            "--loss needs targets: give --input MODULE:FUNCTION, which makes batches of inputs and "
            "targets",
        ),
        (
            "audit --model a:b --input c:d --vocabulary 3",
            "--vocabulary goes with an --input that is a shape",
        ),
        ("audit --model a:b --input 4 --vocabulary -3", f"--vocabulary -3: {COUNT}"),
        ("audit --target nowhere:a", "cannot load nowhere:a: No module named 'nowhere'"),
        ("bench --case resnet", "--case resnet: input should be 'cnn26k', 'resnet18-gn', "),
        ("bench --case mlp mlp", "--case mlp mlp: must not name anything twice"),
        ("bench --case", "--case must name something"),
        ("bench --growth size", "--growth size: input should be 'batch', 'width', 'depth' or"),
        ("bench --growth batch --case mlp", "--growth has a case of its own: leave --case out"),
        ("bench --arms ghost", "--arms ghost needs non-private, which its ratios are to"),
        (
            "bench --arms non-private joint-exact-compiled",
            "--arms joint-exact-compiled needs non-private-compiled, which its ratios are to",
        ),
        ("bench --rounds 0", f"--rounds 0: {COUNT}"),
        ("bench --limit -1", "--limit -1: input should be greater than or equal to 0"),
        ("bench --limit nan", f"--limit nan: {FINITE}"),
        ("bench --limit inf", f"--limit inf: {FINITE}"),
        ("ab --momentum nan", f"--momentum nan: {FINITE}"),
        ("inspect a:b --max-grad-norm inf", f"--max-grad-norm inf: {FINITE}"),
        ("inspect a:b --max-input-norm inf", f"--max-input-norm inf: {FINITE}"),
        ("bench --plot p.png", "--plot draws growth curves: it needs --growth or --from-json"),
        (
            "bench --from-json r.json --rounds 3",
            "--rounds with --from-json needs --case or --growth",
        ),
        (
            "bench --case mlp --from-json r.json --json s.json --resume",
            "--resume and --from-json are two ways to start from results: give one",
        ),
        ("bench --update absent.md", f"--update absent.md: [Errno 2] {ABSENT}: 'absent.md'"),
        (
            "bench --from-json absent",
            "absent is not a results file of opacus-bpclip bench ([Errno 2] No such file or "
            "directory: 'absent')",
        ),
    ],
)
def test_mistakes_of_one_command(line, text, capsys):
    assert error_of(capsys, line).startswith(text)


@pytest.mark.parametrize("command", ["ab --plot none", "bench"])
def test_cuda_without_a_gpu(command, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = "--device cuda: torch finds no GPU here"
    assert error_of(capsys, f"{command} --device cuda") == text


@pytest.mark.parametrize("command", ["ab", "audit", "bench --growth batch"])
def test_a_plot_without_matplotlib(command, capsys, monkeypatch):
    monkeypatch.setattr(
        "opacus_bpclip.jobs.extras.find_spec",
        lambda name: None if name == "matplotlib" else find_spec(name),
    )
    assert error_of(capsys, f"{command} --plot a.png") == f"--plot needs matplotlib, {PIP}"


@pytest.mark.parametrize("command", MEASURING)
@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError("disk full"), 1, "error: disk full"),
        (JobError("the arm\n  flat\n\nfailed\n"), 1, "error: the arm flat failed"),
        (UsageError("wrong:\n- one\n  thing\n- two"), 2, "error: wrong:\n- one thing\n- two"),
    ],
)
def test_what_ends_a_command_is_one_line(command, error, status, text, monkeypatch, capsys):
    def fail(*args):
        raise error

    monkeypatch.setattr(running, "run", fail)
    assert main([command]) == status
    assert capsys.readouterr().err == f"opacus-bpclip {command}: {text}\n"


OUTPUT = {"data": Path("r"), "resume": True, "markdown": Path("m"), "progress": False}
TRAINING = {"epsilon": 2.0, "delta": 1e-6, "epochs": 4, "batch_size": 32, "lr": 0.3}
GIVEN = {
    "ab": {
        "model": "a:b",
        "loss": "a:c",
        "metric": "a:d",
        "lower_is_better": True,
        "collate": "a:e",
        "dataset": "mnist",
        "data_root": Path("d"),
        "seeds": (7, 5),
        "arms": ("paper", "flat"),
        **TRAINING,
        "physical_batch_size": 8,
        "optimizer": "RMSprop",
        "momentum": 0.5,
        "schedule": "LinearLR",
        "accountant": "rdp",
        "device": "cuda",
        "threads": 2,
        "precision": "bfloat16",
        "max_grad_norm": 0.1,
        "max_input_norm": 4.0,
        "bound": "weighted",
        "allocation": "equal",
        "normalize": True,
        "plot": None,
    },
    "audit": {
        "allocation": ("equal",),
        "bound": ("exact",),
        "seed": 7,
        "loss_reduction": ("sum",),
        "full": True,
        "trials": 500,
        "noise_multiplier": 2.0,
        "max_grad_norm": 3.0,
        "max_input_norm": None,
        "alpha": 0.01,
        "delta": 1e-6,
        "model": "a:b",
        "input": "3x4",
        "vocabulary": 3,
        "plot": Path("p"),
        "processes": 3,
    },
    "bench": {
        "case": ("lstm", "text"),
        "arms": ("non-private", "ghost"),
        "rounds": 3,
        "limit": 2.0,
        "threads": 2,
        "processes": 4,
        "precision": "bfloat16",
        "device": "cuda",
        "from_json": Path("a"),
        "update": (Path("b"), Path("c")),
        "plot": Path("p"),
    },
}
# They exclude others that are given.
NOT_GIVEN = {"ab": set(), "audit": {"case", "target", "loss"}, "bench": {"growth"}}


@pytest.mark.parametrize("command", MEASURING)
def test_every_option_arrives(command):
    given = GIVEN[command] | OUTPUT
    words = [command]
    for name, value in given.items():
        option = "json" if name == "data" else name.replace("_", "-")
        words.append(f"--no-{option}" if value is False else f"--{option}")
        if not isinstance(value, bool):
            values = value if isinstance(value, tuple) else (value,)
            words += ["none" if part is None else str(part) for part in values]
    found = parsed(words)
    assert set(found) - set(given) == NOT_GIVEN[command]
    assert {name: found[name] for name in given} == given


def test_the_library_imports_nothing_of_the_command_line():
    code = "import sys, opacus_bpclip; sys.exit(bool({'cyclopts', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
