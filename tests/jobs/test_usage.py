"""Options, their defaults, and the one line that each mistake is answered by, in every command."""

import re
from importlib.util import find_spec
from unittest.mock import Mock

import pytest
import torch

from opacus_bpclip.__main__ import main, program
from opacus_bpclip.audit.settings import CASE_NAMES
from opacus_bpclip.jobs import running
from opacus_bpclip.jobs.errors import JobError, UsageError

MEASURING = ["ab", "audit", "bench"]
ABSENT = "No such file or directory"
PIP = 'which is not installed: pip install "opacus-bpclip[ab]"'


def parsed(line):
    """Return the options of a command line, by name."""
    _, bound, _ = program().parse_args(line, exit_on_error=False, print_error=False)
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


# What the value that a command line ends with must be.
MUST_BE = {
    "must be greater than 0": """
        ab --epsilon 0; ab --lr -1; ab --max-grad-norm 0; audit --noise-multiplier 0
        audit --alpha 0""",
    "must be greater than 0, or none": "ab --max-input-norm -1",
    "must be greater than 0 or 'usual', or none": "audit --max-input-norm -1",
    "must be greater than or equal to 0": """
        ab --seeds -1; audit --seed -1; bench --limit -1""",
    "must be greater than or equal to 1": """
        ab --epochs 0; ab --batch-size -3; ab --threads 0; audit --processes 0
        ab --processes 0; audit --model a:b --input 4 --vocabulary -3; bench --rounds 0
        inspect a:b --input-shape 0""",
    "must be less than or equal to 100": "ab --epsilon 101",
    "must be less than 1": "ab --delta 1; ab --weight-averaging 1; ab --momentum 1",
    "must be a finite number": """
        ab --epsilon nan; ab --epsilon inf; ab --delta nan; ab --momentum nan; bench --limit nan
        bench --limit inf; inspect a:b --max-grad-norm inf""",
    "must be a finite number, or none": """
        ab --max-input-norm nan; inspect a:b --max-input-norm inf""",
    "must be a valid number, or none": "ab --max-input-norm all",
    "must be a valid number or 'usual', or none": "audit --max-input-norm all",
    "must be a valid integer": "ab --epochs many; inspect a:b --input-shape 3,x",
    "must be 'product', 'weighted' or 'exact'": "ab --bound loose; inspect a:b --bound loose",
    "must be 'digits', 'mnist', 'fashion-mnist' or 'cifar10'": "ab --dataset imagenet",
    "must be 'equal' or 'dimension'": "ab --allocation joint",
    "must be 'joint', 'equal' or 'dimension'": "audit --allocation fair",
    "must be 'prv', 'rdp' or 'gdp'": "ab --accountant zcdp",
    "must be 'mean' or 'sum'": "audit --loss-reduction max",
    "must be 'batch', 'width', 'depth' or 'length'": "bench --growth size",
    "must be 0 or at least 100": "audit --trials 5; audit --trials -1",
    "must not name anything twice": """
        ab --arms flat flat; ab --seeds 1 1; audit --case conv conv; bench --case mlp mlp""",
    "must name something": "ab --seeds; audit --case; bench --arms",
}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (line, text)
        for text, lines in MUST_BE.items()
        for line in map(str.strip, re.split("[;\n]", lines))
        if line
    ],
)
def test_a_wrong_value_is_told_with_its_option_and_what_it_must_be(line, text, capsys):
    option = line[line.rindex("--") :].replace("3,x", "x")
    assert error_of(capsys, line) == f"{option}: {text}"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("ab --arms ghostly", "--arms ghostly: must be 'non-private', 'flat', 'flat+in"),
        ("ab --bound product", "--bound product needs a number for --max-input-norm"),
        ("ab --lr 0 --epochs 0", "--epochs 0: must be greater than or equal to 1; --lr 0: must be"),
        (
            "ab --plot none --batch-size 1438",
            "--batch-size 1438 is larger than the training set of digits (1437 examples)",
        ),
        (
            "ab --plot none --epsilon 1e-9",
            "no noise multiplier reaches --epsilon 1e-09 at --delta 1e-05 in 240 steps (The "
            "privacy budget is too low.)",
        ),
        ("audit --case dense", f"--case dense: must be '{CASE_NAMES[0]}', 'sequence-l"),
        ("audit --max-input-norm none", "--bound product needs a number for --max-input-norm"),
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
        ("audit --target nowhere:a", "cannot load nowhere:a: No module named 'nowhere'"),
        ("bench --case resnet", "--case resnet: must be 'cnn26k', 'resnet18-gn', "),
        ("bench --case", "--case must name something"),
        ("bench --growth batch --case mlp", "--growth has a case of its own: leave --case out"),
        ("bench --arms ghost", "--arms ghost needs non-private, which its ratios are to"),
        (
            "bench --arms non-private joint-exact-compiled",
            "--arms joint-exact-compiled needs non-private-compiled, which its ratios are to",
        ),
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
        (OSError("disk full"), 1, "error: disk full"),
        (JobError("the arm\n  flat\n\nfailed\n"), 1, "error: the arm flat failed"),
        (UsageError("wrong:\n- one\n  thing\n- two"), 2, "error: wrong:\n- one thing\n- two"),
    ],
)
def test_what_ends_a_command_is_one_line(command, error, status, text, monkeypatch, capsys):
    monkeypatch.setattr(running, "run", Mock(side_effect=error))
    assert main([command]) == status
    assert capsys.readouterr().err == f"opacus-bpclip {command}: {text}\n"


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(running, "run", Mock(side_effect=KeyboardInterrupt))
    assert main(["bench"]) == 130
    assert capsys.readouterr().err == "opacus-bpclip: interrupted\n"


GIVEN = {
    "ab": """--model a:b --loss a:c --metric a:d --lower-is-better --collate a:e --dataset mnist
        --data-root d --seeds 7 5 --arms paper flat --epsilon 2.0 --delta 1e-06 --epochs 4
        --batch-size 32 --physical-batch-size 8 --optimizer RMSprop --lr 0.3 --momentum 0.5
        --schedule LinearLR --weight-averaging 0.9 --accountant rdp --device cuda --threads 2
        --transform f:g --views 3
        --precision bfloat16
        --max-grad-norm 0.1 --max-input-norm 4.0 --bound weighted
        --allocation equal --normalize --plot none --study s --processes 3""",
    "audit": """--allocation equal --bound exact --seed 7 --loss-reduction sum --full --trials 500
        --threshold adaptive
        --noise-multiplier 2.0 --max-grad-norm 3.0 --max-input-norm none --alpha 0.01 --delta 1e-06
        --model a:b --input 3x4 --vocabulary 3 --plot p --processes 3""",
    "bench": """--case lstm text --arms non-private ghost --rounds 3 --limit 2.0 --threads 2
        --processes 4 --precision bfloat16 --device cuda --from-json a --update b c --plot p""",
}
# They exclude others that are given.
NOT_GIVEN = {"ab": set(), "audit": {"case", "target", "loss"}, "bench": {"growth"}}


@pytest.mark.parametrize("command", MEASURING)
def test_every_option_arrives(command):
    words = f"{GIVEN[command]} --json r --resume --markdown m --no-progress".split()
    given = {}
    for word in words:
        if word.startswith("--"):
            given[word] = []
        else:
            given[list(given)[-1]].append(word)
    found = {}
    for name, value in parsed([command, *words]).items():
        option = f"--{'no-' * (value is False)}{'json' if name == 'data' else name}"
        values = () if isinstance(value, bool) else value if isinstance(value, tuple) else (value,)
        found[option.replace("_", "-")] = ["none" if own is None else str(own) for own in values]
    assert {option: found.pop(option, None) for option in given} == given
    assert {option.removeprefix("--") for option in found} == NOT_GIVEN[command]
