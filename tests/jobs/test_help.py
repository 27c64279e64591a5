"""What the command line says of itself: its help, its version, and what it tells a shell."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import opacus_bpclip
from opacus_bpclip.__main__ import main, program

app = program()


@pytest.mark.parametrize(
    ("command", "texts"),
    [
        ("ab", ["[default: digits 3, mnist 1, fashion-mnist 1, cifar10 3, --data 3]"]),
        ("audit", ["sequence-linear", "3 no violation, but the audit was too weak."]),
        ("bench", ["[default: cnn26k resnet18-gn transformer mlp transformer-512]"]),
        ("inspect", ["[default: exact]", "torchvision.models:resnet18"]),
    ],
)
def test_help_shows_every_option_with_its_default_in_groups(command, texts, capsys):
    assert main([command, "--help"]) == 0
    words = "".join(capsys.readouterr().out.replace("│", " ").split())
    first = "Howtoclip,andwhattotry" if command == "inspect" else "Whattomeasure"
    assert words.index(first) < words.index("Wheretowrite")
    assert words.count("Howtorun") == (command != "inspect")
    for text in texts:
        assert text.replace(" ", "") in words
    for argument in app[command].assemble_argument_collection():
        assert argument.name in words or argument.name == "*"
    assert words.count("[default:") >= words.count("--no-")


@pytest.mark.parametrize(
    ("command", "takers"),
    [
        ("ab", ["--max-input-norm"]),
        ("audit", ["--plot"]),
        ("bench", ["--plot"]),
        ("inspect", ["--max-input-norm"]),
    ],
)
def test_help_says_none_only_where_an_option_takes_the_word(command, takers, capsys):
    assert main([command, "--help"]) == 0
    words = capsys.readouterr().out.replace("│", " ").split()  # a line may end inside of it
    assert " ".join(words).count("[default: none]") == len(takers)
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


def test_neither_the_help_nor_a_mistake_waits_for_torch():
    code = (
        "import sys, opacus_bpclip\n"
        "assert not {'cyclopts', 'pydantic', 'rich'} & set(sys.modules)\n"
        "from opacus_bpclip.__main__ import main\n"
        "assert main(['ab', '--help']) == 0\n"
        "assert main(['bench', '--rounds', '0']) == 2\n"
        "heavy = {'torch', 'opacus', 'numpy', 'matplotlib', 'sklearn', 'torchvision'}\n"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)


def test_the_library_imports_nothing_of_the_command_line():
    folder = Path(opacus_bpclip.__file__).parent
    tools = "ab|audit|bench|inspection|jobs"
    imported = re.compile(
        rf"^\s*(?:from|import) (?:cyclopts|pydantic|rich|opacus_bpclip\.(?:{tools}))\b", re.M
    )
    for file in folder.rglob("*.py"):
        part = file.relative_to(folder).parts[0]
        if part not in [*tools.split("|"), "__init__.py", "__main__.py"]:
            assert not imported.search(file.read_text()), file


def test_every_public_name_is_there():
    assert {*opacus_bpclip.__all__, "__version__"} <= set(dir(opacus_bpclip))
    assert all(hasattr(opacus_bpclip, name) for name in opacus_bpclip.__all__)
    assert not hasattr(opacus_bpclip, "nothing")


def test_a_shell_completes_the_command_line():
    script = app.generate_completion(shell="bash")
    for word in ("ab", "audit", "bench", "inspect", "--max-input-norm"):
        assert word.removeprefix("--") in script
