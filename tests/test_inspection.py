"""``opacus-bpclip inspect``: the table, the data, the exit status, and the errors for typos."""

import json
import sys

import pytest
from torch import nn

from opacus_bpclip import CoverageError
from opacus_bpclip.__main__ import main
from opacus_bpclip.inspection.inspection import inspect
from tests.budgets import layerwise

MODELS = """
import torch
from torch import nn

def good():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 2))

def bad():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LSTM(4, 4))

def frozen():
    return nn.Linear(2, 2).requires_grad_(False)

def greedy(size):
    return nn.Linear(size, size)

class Loop(nn.Module):
    def __init__(self, centre=False):
        super().__init__()
        self.cell, self.head, self.centre = nn.Linear(4, 4), nn.Linear(4, 2), centre

    def forward(self, x):
        for _ in range(3):
            x = self.cell(x)
        return self.head(x - x.mean(dim=0) if self.centre else x)

def coupled():
    return nn.Sequential(Loop(centre=True))

class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.gain * x

def scaled():
    return nn.Sequential(Scale(), nn.Linear(4, 2))

def tokens():
    return nn.Sequential(nn.Embedding(2, 4), nn.Linear(4, 2))

def norms():
    return nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(5)))

INSTANCE = nn.Linear(2, 2)
NUMBER = 3

def number():
    return NUMBER
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A module in the current folder, where a user would have it."""
    (tmp_path / "my_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("my_models", None)


@pytest.mark.usefixtures("models")
def test_a_model_that_would_train_is_shown_layer_by_layer(capsys):
    layerwise_options = ["--allocation", "dimension", "--max-input-norm", "3"]
    assert main(["inspect", "my_models:good", "--max-grad-norm", "2", *layerwise_options]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    heads = ["module", "type", "parameters", "rule", "input", "norm", "bound", "uses"]
    assert table[0] == [*heads, "sensitivity"]
    assert [row[:7] for row in table[1:]] == [
        ["0", "Conv2d", "40", "ConvRule", "3", "exact", "1"],
        ["1", "GroupNorm", "8", "GroupNormRule", "-", "exact", "1"],
        ["3", "Linear", "34", "LinearRule", "3", "exact", "1"],
    ]
    assert sum(float(row[7]) ** 2 for row in table[1:]) == pytest.approx(4.0, abs=1e-3)


@pytest.mark.usefixtures("models")
def test_the_defaults_are_the_librarys(tmp_path):
    path = tmp_path / "rows.json"
    assert main(["inspect", "my_models:good", "--max-grad-norm", "2", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [row["sensitivity"] for row in rows] == [2.0, 2.0, 2.0]
    assert [row["max_input_norm"] for row in rows] == [None, None, None]
    assert {row["bound"] for row in rows} == {"exact"}


@pytest.mark.usefixtures("models")
def test_a_model_that_would_be_refused_says_where_why_and_what_to_do(capsys):
    assert main(["inspect", "my_models:bad"]) == 1
    out = capsys.readouterr().out
    assert "1       BatchNorm1d           8  REFUSED" in out
    assert "- 1 normalises over the batch, so each example's output depends on the other" in out
    assert "- 2 (LSTM): no rule bounds the gradient of weight_ih_l0" in out
    assert "get_compatible_module" in out
    assert "Or freeze it (requires_grad=False)." in out


@pytest.mark.usefixtures("models")
def test_the_same_facts_as_data(tmp_path):
    path = tmp_path / "rows.json"
    arguments = ["my_models:INSTANCE", "--max-input-norm", "3", "--json", str(path)]
    assert main(["inspect", *arguments]) == 0
    assert json.loads(path.read_text()) == [
        {
            "module": "(root)",
            "type": "Linear",
            "parameters": 6,
            "rule": "LinearRule",
            "max_input_norm": 3.0,
            "bound": "exact",
            "uses": 1,
            "sensitivity": 1.0,
            "problem": "",
            "functions": [],
        }
    ]


@pytest.mark.usefixtures("models")
def test_the_functions_that_a_model_calls_on_its_parameters_are_named(tmp_path, capsys):
    path = tmp_path / "rows.json"
    arguments = ["inspect", "my_models:scaled", "--input-shape", "4", "--json", str(path)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert [line.split()[3] for line in out.splitlines()[1:3]] == ["FunctionRule", "LinearRule"]
    rows = json.loads(path.read_text())
    assert [len(row["functions"]) for row in rows] == [1, 0]
    assert rows[0]["functions"][0].startswith("mul ")
    assert f"- 0: {rows[0]['functions'][0]}" in out.splitlines()


@pytest.mark.usefixtures("models")
def test_a_model_with_nothing_to_train_would_be_refused(capsys):
    assert main(["inspect", "my_models:frozen"]) == 1
    assert "no trainable parameter" in capsys.readouterr().out


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["my_models"], "not of the form MODULE:FACTORY"),
        (["nowhere:good"], "cannot load nowhere:good: No module named 'nowhere'"),
        (["my_models:missing"], "has no attribute 'missing'"),
        (["my_models:NUMBER"], "neither callable nor a Module"),
        (["my_models:greedy"], "cannot be called without arguments"),
        (["my_models:number"], "makes a int, not a Module"),
        (["my_models:good", "--max-input-norm", "-1"], "max_input_norm=-1.0"),
        (
            ["my_models:good", "--max-grad-norm", "nan"],
            "--max-grad-norm nan: input should be a finite number",
        ),
        (["my_models:Loop", "--uses", "auto"], "give their --input-shape"),
        (["my_models:Loop", "--uses", "cell"], "neither NAME=K nor auto alone"),
        (["my_models:Loop", "--uses", "cell=0"], "an integer >= 1"),
        (
            ["my_models:Loop", "--uses", "body=2"],
            "names layers that the model does not train: body",
        ),
        (["my_models:good", "--input-shape", "3,x"], "--input-shape x: input should be a valid"),
        (["my_models:good", "--bound", "loose"], "--bound loose: input should be 'product', "),
        (["my_models:good", "--input-shape", "3"], "does not run on such an input"),
        (["my_models:good", "--json", "no/such/folder.json"], "No such file"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_wrong_use_gets_one_line_and_status_two(arguments, message, capsys):
    assert main(["inspect", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("opacus-bpclip inspect: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    "arguments",
    [["--uses", "cell=3"], ["--uses", "auto", "--input-shape", "4"]],
    ids=["declared", "counted"],
)
def test_uses_are_shown(arguments, capsys):
    assert main(["inspect", "my_models:Loop", *arguments]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(row[0], row[6]) for row in table[1:]] == [("cell", "3"), ("head", "1")]


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("options", ["--uses cell=3", "--uses auto --input-shape 4"])
def test_the_model_may_come_last(options, capsys):
    assert main(["inspect", *options.split(), "my_models:Loop"]) == 0
    assert "cell " in capsys.readouterr().out


@pytest.mark.usefixtures("models")
def test_coupled_examples_are_found_on_made_up_ones(capsys):
    assert main(["inspect", "my_models:coupled"]) == 0
    capsys.readouterr()
    assert main(["inspect", "my_models:coupled", "--input-shape", "4"]) == 1
    out = capsys.readouterr().out
    assert any(line.split()[:4] == ["0", "Loop", "0", "REFUSED"] for line in out.splitlines())
    assert "- 0 (Loop) couples examples: its output for one example changes with the values" in out


@pytest.mark.usefixtures("models")
def test_ids_are_made_up_for_an_embedding(capsys):
    arguments = ["inspect", "my_models:tokens", "--input-shape", "7"]
    assert main([*arguments, "--input-dtype", "int"]) == 0
    assert main(arguments) == 2
    assert "the model does not run on such an input: RuntimeError: " in capsys.readouterr().err


@pytest.mark.usefixtures("models")
def test_a_problem_of_many_modules_is_said_once(capsys):
    assert main(["inspect", "my_models:norms"]) == 1
    out = capsys.readouterr().out
    assert out.count("normalises over the batch") == 1
    assert "- 0, 1 and 3 more normalises over the batch" in out


def test_an_allocation_that_does_not_fit_is_an_error():
    with pytest.raises(CoverageError, match="no such layer: head"):
        inspect(nn.Linear(2, 2), layerwise(allocation={"head": 1.0}))
