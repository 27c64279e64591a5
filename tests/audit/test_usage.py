"""Each mistake on the command line is answered by one line, before any work."""

from importlib.util import find_spec

import pytest
from opacus_bpclip.cli import main

from opacus_bpclip.audit.settings import CASE_NAMES, Settings
from opacus_bpclip.jobs.errors import UsageError


def error_of(capsys, *options, lines=1):
    """Run a command line that must fail as wrong usage, and return what it says."""
    assert main(["audit", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == lines
    return err.removeprefix("opacus-bpclip audit: error: ").rstrip("\n")


@pytest.mark.usefixtures("users_code")
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            "--case dense",
            f"--case must be one of {', '.join(CASE_NAMES)}, not 'dense'",
        ),
        (
            "--allocation fair",
            "--allocation must be one of joint, equal, dimension, not 'fair'",
        ),
        ("--bound loose", "--bound must be one of product, weighted, exact, not 'loose'"),
        ("--loss-reduction max", "--loss-reduction must be one of mean, sum, not 'max'"),
        ("--case conv conv", "--case must not name anything twice: conv conv"),
        ("--noise-multiplier 0", "--noise-multiplier must be a finite number above 0, not 0.0"),
        ("--max-grad-norm nan", "--max-grad-norm must be a finite number above 0, not nan"),
        ("--max-input-norm -1", "--max-input-norm must be a finite number above 0, not -1.0"),
        ("--max-input-norm none", "--bound product needs a number for --max-input-norm"),
        (
            "--max-input-norm all",
            "argument --max-input-norm: expected a number or none, not 'all' (see opacus-bpclip "
            "audit --help)",
        ),
        ("--alpha 0", "--alpha must be between 0 and 1, not 0.0"),
        ("--delta 1", "--delta must be between 0 and 1, not 1.0"),
        ("--trials 5", "--trials must be 0 or at least 100, not 5"),
        ("--seed -1", "--seed must be 0 or above, not -1"),
        ("--processes 0", "--processes must be at least 1, not 0"),
        ("--resume", "--resume needs --json FILE, the file to continue from"),
        (
            "--target a:b --model c:d",
            "--target and --model are two ways to name what is audited: give one",
        ),
        (
            "--model users_code:net",
            "--model needs --input, an example's shape or MODULE:FUNCTION",
        ),
        ("--input 4", "--input goes with --model MODULE:FACTORY"),
        ("--loss a:b", "--loss goes with --model MODULE:FACTORY"),
        ("--vocabulary 3", "--vocabulary goes with --model MODULE:FACTORY"),
        (
            "--model users_code:net --input 4y5",
            "--input must be a shape such as 3x8x8, or MODULE:FUNCTION, not '4y5'",
        ),
        (
            "--model users_code:net --input 0",
            "--input must be a shape such as 3x8x8, or MODULE:FUNCTION, not '0'",
        ),
        (
            "--model users_code:net --input 4 --loss users_code:loss",
            "--loss needs targets: give --input MODULE:FUNCTION, which makes batches of inputs and "
            "targets",
        ),
        (
            "--model users_code:net --input users_code:batch --vocabulary 3",
            "--vocabulary goes with an --input that is a shape",
        ),
        (
            "--model users_code:net --input 4 --vocabulary -3",
            "--vocabulary must be at least 1, not -3",
        ),
        ("--target nowhere:a", "cannot import nowhere: No module named 'nowhere'"),
        ("--target users_code:absent", "users_code has no absent"),
        ("--target users_code:NUMBER", "users_code:NUMBER is not callable"),
        (
            "--target users_code:number",
            "users_code:number makes a int, not an opacus_bpclip.audit.Target",
        ),
        (
            "--model users_code:number --input 4",
            "users_code:number makes a int, not a torch.nn.Module",
        ),
        (
            "--model users_code:greedy --input 4",
            "users_code:greedy cannot be called without arguments: greedy() missing 1 required "
            "positional argument: 'size'",
        ),
        (
            "--model users_code:two --input 4",
            "the model's output is a tuple, not one tensor; name a loss that takes it",
        ),
        (
            "--json absent/a.json",
            "--json absent/a.json cannot be written: No such file or directory",
        ),
        ("--plot a.doc", "--plot a.doc: name a file that ends in .png, .pdf or .svg"),
    ],
)
def test_wrong_usage(options, text, capsys):
    assert error_of(capsys, *options.split()) == text


@pytest.mark.usefixtures("users_code")
def test_a_model_that_would_be_refused_is_refused_before_any_work(capsys):
    # One line for each problem of the model.
    text = error_of(capsys, "--model", "users_code:batch_norm", "--input", "4", lines=2)
    assert "\n- 1 normalises over the batch" in text


def test_without_matplotlib_a_plot_is_refused_before_any_work(capsys, monkeypatch):
    monkeypatch.setattr(
        "opacus_bpclip.jobs.extras.find_spec",
        lambda name: None if name == "matplotlib" else find_spec(name),
    )
    assert error_of(capsys, "--plot", "a.png").startswith(
        "a plot needs matplotlib, which is not installed: pip install "
    )


def test_settings_are_checked_wherever_they_are_made():
    with pytest.raises(UsageError, match=r"--trials must be 0 or at least 100"):
        Settings(trials=-1)
