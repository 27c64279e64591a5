"""``opacus-bpclip inspect``: the table, the data, the exit status, and the errors for typos."""

import json
import sys
from pathlib import Path

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


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    """A module in the current folder, where a user would have it."""
    (tmp_path / "my_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("my_models", None)


@pytest.fixture
def table(capsys):
    """Return what inspects a model that would train, and returns the table's rows as words."""

    def inspected(line):
        assert main(["inspect", *line.split()]) == 0
        return [row.split() for row in capsys.readouterr().out.splitlines()]

    return inspected


def rows_of(line):
    """Inspect a model that would train, and return the rows as data."""
    assert main(["inspect", *line.split(), "--json", "rows.json"]) == 0
    return json.loads(Path("rows.json").read_text())


@pytest.fixture
def refusal(capsys):
    """Return what inspects a model that would be refused, and returns the text on stdout."""

    def inspected(line):
        assert main(["inspect", *line.split()]) == 1
        return capsys.readouterr().out

    return inspected


def test_a_model_that_would_train_is_shown_layer_by_layer(table):
    options = "--max-grad-norm 2 --allocation dimension --max-input-norm 3"
    head, *rows = table(f"my_models:good {options}")
    heads = ["module", "type", "parameters", "rule", "input", "norm", "bound", "uses"]
    assert head == [*heads, "sensitivity"]
    assert [row[:7] for row in rows] == [
        ["0", "Conv2d", "40", "ConvRule", "3", "exact", "1"],
        ["1", "GroupNorm", "8", "GroupNormRule", "-", "exact", "1"],
        ["3", "Linear", "34", "LinearRule", "3", "exact", "1"],
    ]
    assert sum(float(row[7]) ** 2 for row in rows) == pytest.approx(4.0, abs=1e-3)


def test_the_defaults_are_the_librarys():
    rows = rows_of("my_models:good --max-grad-norm 2")
    assert [row["sensitivity"] for row in rows] == [2.0, 2.0, 2.0]
    assert [row["max_input_norm"] for row in rows] == [None, None, None]
    assert {row["bound"] for row in rows} == {"exact"}


def test_a_model_that_would_be_refused_says_where_why_and_what_to_do(refusal):
    out = refusal("my_models:bad")
    for text in (
        "1       BatchNorm1d           8  REFUSED",
        "- 1 normalises over the batch, so each example's output depends on the other",
        "- 2 (LSTM): no rule bounds the gradient of weight_ih_l0",
        "get_compatible_module",
        "Or freeze it (requires_grad=False).",
    ):
        assert text in out


def test_the_same_facts_as_data():
    assert rows_of("my_models:INSTANCE --max-input-norm 3") == [
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


def test_the_functions_that_a_model_calls_on_its_parameters_are_named(capsys):
    rows = rows_of("my_models:scaled --input-shape 4")
    assert [(row["rule"], len(row["functions"])) for row in rows] == [
        ("FunctionRule", 1),
        ("LinearRule", 0),
    ]
    assert rows[0]["functions"][0].startswith("mul ")
    assert f"- 0: {rows[0]['functions'][0]}" in capsys.readouterr().out.splitlines()


def test_a_model_with_nothing_to_train_would_be_refused(refusal):
    assert "no trainable parameter" in refusal("my_models:frozen")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("my_models", "not of the form MODULE:FACTORY"),
        ("nowhere:good", "cannot load nowhere:good: No module named 'nowhere'"),
        ("my_models:missing", "has no attribute 'missing'"),
        ("my_models:NUMBER", "neither callable nor a Module"),
        ("my_models:greedy", "cannot be called without arguments"),
        ("my_models:number", "makes a int, not a Module"),
        ("my_models:good --max-input-norm -1", "max_input_norm=-1.0"),
        ("my_models:Loop --uses auto", "give their --input-shape"),
        ("my_models:Loop --uses cell", "neither NAME=K nor auto alone"),
        ("my_models:Loop --uses cell=0", "an integer >= 1"),
        ("my_models:Loop --uses body=2", "names layers that the model does not train: body"),
        ("my_models:good --input-shape 3", "does not run on such an input"),
        ("my_models:tokens --input-shape 7", "does not run on such an input: RuntimeError: "),
        ("my_models:good --json no/such/folder.json", "No such file"),
    ],
)
def test_wrong_use_gets_one_line_and_status_two(line, message, capsys):
    assert main(["inspect", *line.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("opacus-bpclip inspect: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("options", ["--uses cell=3", "--uses auto --input-shape 4"])
def test_declared_and_counted_uses_are_shown_and_the_model_may_come_last(options, table):
    head, *rows = table(f"{options} my_models:Loop")
    assert [(row[0], row[6]) for row in rows] == [("cell", "3"), ("head", "1")]
    assert table(f"my_models:Loop {options}") == [head, *rows]


def test_coupled_examples_are_found_on_made_up_ones(table, refusal):
    table("my_models:coupled")
    out = refusal("my_models:coupled --input-shape 4")
    assert any(line.split()[:4] == ["0", "Loop", "0", "REFUSED"] for line in out.splitlines())
    assert "- 0 (Loop) couples examples: its output for one example changes with the values" in out


def test_ids_are_made_up_for_an_embedding(table):
    assert len(table("my_models:tokens --input-shape 7 --input-dtype int")) == 3


def test_a_problem_of_many_modules_is_said_once(refusal):
    out = refusal("my_models:norms")
    assert out.count("normalises over the batch") == 1
    assert "- 0, 1 and 3 more normalises over the batch" in out


def test_an_allocation_that_does_not_fit_is_an_error():
    with pytest.raises(CoverageError, match="no such layer: head"):
        inspect(nn.Linear(2, 2), layerwise(allocation={"head": 1.0}))
