"""A user's own code that raises is told of in one line."""

import sys

import pytest
from torch import nn

from opacus_bpclip.__main__ import main
from opacus_bpclip.jobs.errors import UsageError
from opacus_bpclip.jobs.loading import made_by

RAISING = """
def factory():
    raise KeyError("no\\nlayers")

def mistyped():
    return len(3)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return what writes a module of a user's own and leaves it to be imported."""
    monkeypatch.chdir(tmp_path)

    def write(text):
        (tmp_path / "raising_code.py").write_text(text)

    yield write
    sys.modules.pop("raising_code", None)


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (
            "1 / 0",
            "net",
            r"ZeroDivisionError: division by zero \(raised at \S+_code.py:1\)",
        ),
        ("def (", "net", r"SyntaxError: invalid syntax \(raising_code\.py, line 1\)"),
        (RAISING, "factory", r"KeyError: 'no\\nlayers' \(raised at \S+/raising_code\.py:3\)"),
        (RAISING, "mistyped", r"TypeError: object of type 'int' .* \(raised at \S+\.py:6\)"),
    ],
    ids=["module that raises", "module with a syntax error", "factory", "factory's own TypeError"],
)
def test_code_that_raises_is_told_of_in_one_line(text, name, message, module):
    module(text)
    with pytest.raises(UsageError, match=rf"^(cannot load )?raising_code:{name}: {message}$"):
        made_by(f"raising_code:{name}", nn.Module)


@pytest.mark.parametrize(
    "line",
    [
        "inspect raising_code:factory",
        "audit --model raising_code:factory --input 3",
        "audit --target raising_code:factory",
    ],
)
def test_every_command_tells_of_it_in_one_line(line, module, capsys):
    module(RAISING)
    assert main(line.split()) == 2
    err = capsys.readouterr().err
    command = line.split()[0]
    assert err.startswith(f"opacus-bpclip {command}: error: raising_code:factory: KeyError: ")
    assert err.count("\n") == 1


def test_examples_that_need_more_memory_than_there_is(capsys):
    shape = "1000000000,1000000000"
    assert main(["inspect", "torch.nn:Identity", "--input-shape", shape]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"opacus-bpclip inspect: error: --input-shape {shape}: RuntimeError: ")
    assert err.count("\n") == 1
