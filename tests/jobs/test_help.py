"""What the command line says of itself: its help, its version, and what it tells a shell."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import opacus_bpclip
from opacus_bpclip.__main__ import app, main


@pytest.mark.parametrize(
    ("command", "texts"),
    [
        ("ab", ["[default: digits 3, mnist 1, fashion-mnist 1, cifar10 3, --data 3]"]),
        ("audit", ["sequence-linear", "3 no violation, but the audit was too weak."]),
        ("bench", ["[default: cnn26k resnet18-gn transformer mlp transformer-512]"]),
        ("inspect", ["[default: exact]", "torchvision.models:resnet18"]),
    ],
)
def test_help_shows_every_option_with_its_default(command, texts, capsys):
    assert main([command, "--help"]) == 0
    words = "".join(capsys.readouterr().out.replace("│", " ").split())
    for text in texts:
        assert text.replace(" ", "") in words
    for argument in app[command].assemble_argument_collection():
        assert argument.name in words or argument.name == "*"
    assert words.count("[default:") >= words.count("--no-")


@pytest.mark.parametrize(
    ("command", "takers"),
    [("ab", []), ("audit", ["--plot"]), ("bench", ["--plot"]), ("inspect", ["--max-input-norm"])],
)
def test_help_says_none_only_where_an_option_takes_the_word(command, takers, capsys):
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out.count("[default: none]") == len(takers)
    before = ["a:b"] if command == "inspect" else []
    for option in takers:
        name = option.removeprefix("--").replace("-", "_")
        _, bound, _ = app.parse_args([command, *before, option, "none"], exit_on_error=False)
        groups = bound.arguments.values()
        assert [getattr(own, name) for own in groups if hasattr(own, name)] == [None]


def test_version_and_no_command(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{version('opacus-bpclip')}\n"
    assert opacus_bpclip.__version__ == version("opacus-bpclip")
    assert main([]) == 2
    text = "opacus-bpclip: error: name a command (see opacus-bpclip --help)\n"
    assert capsys.readouterr().err == text


def test_help_imports_nothing_heavy():
    # The package's own imports are left out by an empty stand-in for it.
    folder = Path(opacus_bpclip.__file__).parent
    code = (
        "import sys, types\n"
        "package = types.ModuleType('opacus_bpclip')\n"
        f"package.__path__ = [{str(folder)!r}]\n"
        "sys.modules['opacus_bpclip'] = package\n"
        "from opacus_bpclip.__main__ import main\n"
        "assert main(['ab', '--help']) == 0\n"
        "heavy = {'torch', 'opacus', 'numpy', 'matplotlib', 'sklearn', 'torchvision'}\n"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_the_command_line(shell):
    script = app.generate_completion(shell=shell)
    for word in ("ab", "audit", "bench", "inspect", "--max-input-norm"):
        assert word.removeprefix("--") in script
