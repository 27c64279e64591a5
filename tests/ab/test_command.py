"""Options, their defaults, and the one line that each mistake is answered by."""

import argparse
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from opacus_bpclip.cli import build_parser, main

import opacus_bpclip
from opacus_bpclip import BackpropClipping
from opacus_bpclip.ab import command, job
from opacus_bpclip.ab.settings import ARMS, Output, settings_for
from opacus_bpclip.jobs.errors import UsageError


def parsed(*options):
    args = vars(build_parser().parse_args(["ab", *options]))
    return {name: args[name] for name in args if name not in ("run", "command")}


def error_of(capsys, *options):
    """Run a command line that must fail as wrong usage, and return its one line."""
    assert main(["ab", "--plot", "none", "--no-progress", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err.removeprefix("opacus-bpclip ab: error: ").rstrip("\n")


def test_defaults_are_the_datasets_own():
    assert parsed() == {"plot": Path("opacus-bpclip-ab.png"), "progress": True}
    digits, mnist = settings_for(), settings_for("mnist")
    assert (digits.epsilon, digits.batch_size, digits.threads) == (3.0, 128, 1)
    assert (mnist.epsilon, mnist.epochs, mnist.batch_size, mnist.lr) == (1.0, 10, 1024, 0.5)
    assert (mnist.max_grad_norm, mnist.max_input_norm, mnist.momentum) == (1.0, None, 0.9)
    assert (mnist.delta, mnist.bound, mnist.allocation) == (1e-5, "exact", "dimension")
    assert mnist.seeds == (0, 1, 2)
    assert mnist.arms == ARMS
    assert settings_for("fashion-mnist").batch_size == 1024
    assert mnist.accountant == "prv"


def test_every_option_reaches_the_settings():
    training = (
        "--dataset mnist --data-root d --seeds 7 5 --arms backprop flat --epsilon 2 --delta 1e-6 "
        "--epochs 4 --batch-size 32 --lr 0.3 --momentum 0.5 --accountant rdp --device cpu "
        "--precision bfloat16"
    )
    clipping = "--max-grad-norm 0.1 --max-input-norm 4 --bound weighted --allocation equal"
    rest = "--normalize --threads 2 --json r.json --plot none --resume --no-progress"
    given = parsed(*training.split(), *clipping.split(), *rest.split())
    output = {name: given.pop(name) for name in ("json", "plot", "resume", "progress")}
    assert output == {"json": Path("r.json"), "plot": None, "resume": True, "progress": False}
    settings = settings_for(**given)
    assert vars(settings) == {
        "dataset": "mnist",
        "data_root": "d",
        "epsilon": 2.0,
        "delta": 1e-6,
        "epochs": 4,
        "batch_size": 32,
        "lr": 0.3,
        "momentum": 0.5,
        "max_grad_norm": 0.1,
        "max_input_norm": 4.0,
        "bound": "weighted",
        "allocation": "equal",
        "normalize": True,
        "seeds": (7, 5),
        "arms": ("backprop", "flat"),
        "threads": 2,
        "accountant": "rdp",
        "device": "cpu",
        "precision": "bfloat16",
    }


def test_backprop_is_the_library_by_default():
    settings = settings_for()
    assert settings.backprop("backprop") == BackpropClipping()
    assert settings.backprop("backprop-layerwise") == BackpropClipping(allocation="dimension")
    assert settings.backprop("paper") == BackpropClipping.paper()
    assert [settings.backprop(arm) for arm in ARMS[:3]] == [None, None, None]
    assert settings.allocation == BackpropClipping.paper().allocation


def test_options_are_those_of_the_arms_that_have_them():
    given = {"bound": "weighted", "max_input_norm": 4.0, "normalize": True}
    settings = settings_for(allocation="equal", **given)
    assert settings.backprop("backprop") == BackpropClipping(**given)
    layerwise = BackpropClipping(allocation="equal", **given)
    assert settings.backprop("backprop-layerwise") == layerwise
    assert settings.backprop("paper") == BackpropClipping.paper()


@pytest.mark.parametrize(
    ("given", "norms"), [(None, [None, None, 3, None, None, 3]), (4, [None, None, 4, 4, 4, 3])]
)
def test_input_norm_of_each_arm(given, norms):
    settings = settings_for(max_input_norm=given)
    assert [settings.input_norm(arm) for arm in ARMS] == norms


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--epsilon 0", "--epsilon must be a finite number above 0, not 0.0"),
        ("--epsilon nan", "--epsilon must be a finite number above 0, not nan"),
        ("--epsilon inf", "--epsilon must be a finite number above 0, not inf"),
        (
            "--epsilon 101",
            "--epsilon must be at most 100, not 101: more is no privacy; --arms non-private trains "
            "without any",
        ),
        ("--delta 1", "--delta must be between 0 and 1, not 1.0"),
        ("--delta nan", "--delta must be between 0 and 1, not nan"),
        ("--momentum 1", "--momentum must be at least 0 and below 1, not 1.0"),
        ("--lr -1", "--lr must be a finite number above 0, not -1.0"),
        ("--max-grad-norm 0", "--max-grad-norm must be a finite number above 0, not 0.0"),
        ("--max-input-norm nan", "--max-input-norm must be a finite number above 0, not nan"),
        ("--epochs 0", "--epochs must be at least 1, not 0"),
        ("--batch-size -3", "--batch-size must be at least 1, not -3"),
        ("--threads 0", "--threads must be at least 1, not 0"),
        (
            "--dataset imagenet",
            "--dataset must be one of digits, mnist, fashion-mnist, cifar10, not 'imagenet'",
        ),
        ("--bound loose", "--bound must be one of product, weighted, exact, not 'loose'"),
        ("--allocation joint", "--allocation must be one of equal, dimension, not 'joint'"),
        ("--accountant zcdp", "--accountant must be one of prv, rdp, gdp, not 'zcdp'"),
        ("--device tpu", "--device must be one of cpu, cuda, not 'tpu'"),
        (
            "--arms ghost",
            "--arms must be one of non-private, flat, flat+input-clipping, backprop, "
            "backprop-layerwise, paper, not 'ghost'",
        ),
        ("--arms flat flat", "--arms must not name anything twice: flat flat"),
        ("--seeds 1 1", "--seeds must not name anything twice: 1 1"),
        ("--seeds -1", "--seeds must be 0 or above, not -1"),
        ("--bound product", "--bound product needs a number for --max-input-norm"),
        ("--resume", "--resume needs --json FILE, the file to continue from"),
        (
            "--batch-size 1438",
            "--batch-size 1438 is larger than the training set of digits (1437 examples)",
        ),
        (
            "--epsilon 1e-9",
            "no noise multiplier reaches --epsilon 1e-09 at --delta 1e-05 in 240 steps (The "
            "privacy budget is too low.)",
        ),
        (
            "--seeds",
            "argument --seeds: expected at least one argument (see opacus-bpclip ab --help)",
        ),
        (
            "--epochs many",
            "argument --epochs: invalid int value: 'many' (see opacus-bpclip ab --help)",
        ),
        (
            "--max-input-norm all",
            "argument --max-input-norm: expected a number or none, not 'all' (see opacus-bpclip ab "
            "--help)",
        ),
    ],
)
def test_wrong_usage(options, text, capsys):
    assert error_of(capsys, *options.split()) == text


def test_settings_refuse_empty_seeds():
    with pytest.raises(UsageError, match=r"^--seeds must not be empty$"):
        settings_for(seeds=())


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_unwritable_file_is_found_before_training(option, tmp_path, capsys):
    absent = tmp_path / "absent" / "file.png"
    assert error_of(capsys, option, str(absent)) == (
        f"{option} {absent} cannot be written: No such file or directory"
    )
    folder = tmp_path / "folder.png"
    folder.mkdir()
    assert error_of(capsys, option, str(folder)) == (
        f"{option} {folder} cannot be written: Is a directory"
    )


def test_check_leaves_no_file_behind(tmp_path):
    job.check(settings_for(), Output(json=tmp_path / "a.json", plot=tmp_path / "a.png"))
    assert list(tmp_path.iterdir()) == []


def test_unknown_plot_format(tmp_path, capsys):
    path = tmp_path / "plot.doc"
    assert error_of(capsys, "--plot", str(path)) == (
        f"--plot {path}: name a file that ends in .png, .pdf or .svg"
    )


def test_cuda_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(job.torch.cuda, "is_available", lambda: False)
    assert error_of(capsys, "--device", "cuda") == "--device cuda: torch finds no GPU here"


@pytest.mark.parametrize(
    ("package", "output", "text"),
    [
        ("tqdm", Output(progress=True), "a progress bar (or else --no-progress) needs tqdm"),
        ("matplotlib", Output(plot=Path("p.png")), "a plot (or else --plot none) needs matplotlib"),
    ],
)
def test_missing_extra(package, output, text, monkeypatch):
    monkeypatch.setattr("opacus_bpclip.jobs.extras.find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        job.check(settings_for(), output)
    assert str(caught.value) == (f'{text}, which is not installed: pip install "opacus-bpclip[ab]"')


def test_interruption_has_its_own_status(monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_run", interrupt)
    assert main(["ab"]) == 130
    assert capsys.readouterr().err == "opacus-bpclip ab: interrupted\n"


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"opacus-bpclip {version('opacus-bpclip')}\n"
    assert opacus_bpclip.__version__ == version("opacus-bpclip")
    assert main(["ab", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "privacy target (default: digits 3, mnist 1, fashion-" in text


def test_no_command(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err == (
        "opacus-bpclip: error: the following arguments are required: COMMAND (see opacus-bpclip "
        "--help)\n"
    )


def test_command_line_imports_nothing_heavy_by_itself():
    # The package's own imports are left out by an empty stand-in for it.
    folder = Path(opacus_bpclip.__file__).parent
    code = (
        "import sys, types\n"
        "package = types.ModuleType('opacus_bpclip')\n"
        f"package.__path__ = [{str(folder)!r}]\n"
        "sys.modules['opacus_bpclip'] = package\n"
        "from opacus_bpclip.cli import main\n"
        "assert main(['ab', '--help']) == 0\n"
        "heavy = {'torch', 'opacus', 'numpy', 'matplotlib', 'sklearn', 'torchvision', 'tqdm'}\n"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_commands_share_one_interface():
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    assert parser.parse_args(["ab"]).run is command.run
