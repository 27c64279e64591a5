"""A user's own model and data: what trains, by which arms, and what the table says."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from opacus.accountants.utils import get_noise_multiplier
from torch import nn

from opacus_bpclip import compare
from opacus_bpclip.__main__ import main
from opacus_bpclip.ab import privacy, trial
from opacus_bpclip.ab.settings import OWN_ARMS, Settings
from opacus_bpclip.ab.task import task_of
from opacus_bpclip.jobs.errors import UsageError
from tests.ab import stranger

OWN = "tests.ab.stranger:"
SHORT = {"seeds": [0], "epochs": 1, "batch_size": 16, "delta": 1e-2}
SEARCHED = functools.cache(get_noise_multiplier)


@pytest.fixture(autouse=True)
def _searched_once(monkeypatch):
    """The search for the noise takes longer than all training here, and is always the same."""
    monkeypatch.setattr(privacy, "get_noise_multiplier", SEARCHED)


def compared(model, data, **options):
    return compare(f"{OWN}{model}", f"{OWN}{data}", **{**SHORT, **options})


def notes(table):
    return {row.arm: row.note for row in table.rows if row.note}


def test_opacus_modes_train_a_cnn_in_parts_of_a_batch():
    """With an optimizer and a schedule by name."""
    arms = ["non-private", "flat", "ghost", "ew", "per_layer", "adaptive", "backprop"]
    given = {"optimizer": "Adam", "schedule": "OneCycleLR", "physical_batch_size": 5}
    table = compared("Net", "pictures", arms=arms, **given)
    assert notes(table) == {}
    assert [row.arm for row in table.rows] == arms
    assert (table.metric, table.higher_is_better) == ("accuracy", True)
    for row in table.rows:
        assert 0 <= row.metric <= 1
        assert row.seconds > 0
        assert row.epsilon is None if row.arm == "non-private" else 2.9 < row.epsilon <= 3
    text = str(table)
    assert "Adam with lr 0.1, OneCycleLR, physical batches of at most 5, seeds 0" in text
    assert "unknown" in text


def test_dictionaries_are_passed_by_keyword():
    table = compared(
        "Encoder", "texts", arms=["non-private", "flat", "backprop"], optimizer="AdamW"
    )
    assert notes(table) == {}
    assert len(table.rows) == 3


def test_a_regression_is_judged_by_its_own_metric():
    """A loss that is a function, factories of optimizer and schedule, and ghost clipping."""
    arms = ["non-private", "flat", "ghost", "backprop"]
    given = {"loss": f"{OWN}absolute", "optimizer": f"{OWN}adam", "schedule": f"{OWN}halved"}
    table = compared(
        "regression", "numbers", metric=f"{OWN}rmse", lower_is_better=True, arms=arms, **given
    )
    assert notes(table) == {}
    assert (table.metric, table.higher_is_better) == ("rmse", False)
    assert "rmse (lower is better)" in str(table).splitlines()[5]
    metrics = {row.arm: row.metric for row in table.rows}
    # One loss, one noise, no input clipping: the three private arms compute one thing.
    assert metrics["ghost"] == pytest.approx(metrics["flat"], rel=1e-4)
    assert metrics["non-private"] > 0


def test_an_arm_that_cannot_train_the_model_says_why_and_the_others_go_on():
    table = compared("Scaled", "numbers", loss=nn.MSELoss, arms=["flat", "per_layer", "backprop"])
    assert set(notes(table)) == {"flat", "per_layer"}
    assert "backprop" in [row.arm for row in table.rows if row.metric is not None]
    assert (table.metric, table.higher_is_better) == ("loss", False)
    said = str(table).splitlines()
    assert sum(line.startswith("flat cannot train this model: ") for line in said) == 1
    row = table.to_dict()["rows"][0]
    assert (row["arm"], row["metric"], row["seed"]) == ("flat", None, None)


def test_objects_need_no_name_and_leave_the_process_as_it_was():
    model = nn.Linear(4, 2)
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.randn(64, 4)
    data = [(row, int(row.sum() > 0)) for row in x]
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    table = compare(
        model,
        (data, data[:8]),
        metric=lambda outputs, targets: len(outputs),
        collate=lambda items: (
            torch.stack([x for x, _ in items]),
            torch.tensor([y for _, y in items]),
        ),
        arms=["backprop"],
        threads=threads,
        **SHORT,
    )
    assert [row.metric for row in table.rows] == [8]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_run_is_continued(tmp_path, monkeypatch):
    kept = {"json": tmp_path / "r.json", "resume": True, "loss": nn.MSELoss}
    first = compared("regression", "numbers", arms=["flat"], **kept)
    trained = []
    train = trial.problem_of
    monkeypatch.setattr(trial, "problem_of", lambda *args: trained.append(args[0]) or train(*args))
    both = compared("regression", "numbers", arms=["flat", "backprop"], **kept)
    assert trained == ["backprop"]
    assert both.rows[0] == first.rows[0]
    with pytest.raises(UsageError, match=r"loss torch\.nn\.modules\.loss:MSELoss there, torch\.nn"):
        compared("regression", "numbers", arms=["flat"], **{**kept, "loss": nn.L1Loss})


def test_the_command_trains_in_processes_that_load_the_same_names(tmp_path, monkeypatch, capfd):
    shutil.copy(Path(stranger.__file__), tmp_path / "strangers_code.py")
    monkeypatch.chdir(tmp_path)
    code = "strangers_code:"
    own = f"--model {code}Net --data {code}pictures --metric {code}Counted --delta 0.01"
    rest = "--arms backprop --seeds 0 --epochs 1 --batch-size 16 --no-progress"
    files = "--plot p.png --json r.json"
    assert main(["ab", *own.split(), *rest.split(), *files.split()]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.startswith(f"{code}pictures with {code}Net: 64 training and 24 test examples")
    assert out.splitlines()[-2:] == ["plot: p.png", "data: r.json"]
    assert Path("p.png").stat().st_size > 0
    (arm,) = json.loads(Path("r.json").read_text())["results"]
    assert arm["metric_mean"] == 24
    assert arm["epsilon"] <= 3.0
    assert arm["peak_memory_bytes"] < 500 * 2**20


LOSSES = "Private training needs each example's own loss: give a criterion whose reduction='none'"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"model": "absent:Net"}, "cannot load absent:Net: No module named 'absent'"),
        ({"model": "Net"}, "cannot load Net: it is not of the form MODULE:FACTORY"),
        ({"model": f"{OWN}needs"}, f"{OWN}needs cannot be called without arguments: needs()"),
        ({"model": f"{OWN}numbers"}, f"{OWN}numbers makes a tuple, not a Module"),
        ({"model": "torch.nn:ReLU"}, "torch.nn:ReLU has no trainable parameter"),
        ({"model": f"{OWN}Net"}, f"{OWN}Net on a batch of {OWN}numbers: RuntimeError: Expected"),
        ({"data": f"{OWN}one_set"}, f"{OWN}one_set makes a tuple of 1, not a training and a test"),
        ({"data": f"{OWN}streams"}, f"{OWN}streams: the training set is a Stream, which has no"),
        (
            {"data": f"{OWN}unlabelled"},
            "a batch has the keys 'x', and no labels: name them 'labels'",
        ),
        ({"loss": None}, f"{OWN}numbers: the targets are torch.float32, and cross-entropy, the lo"),
        ({"loss": f"{OWN}reduced"}, f"{OWN}reduced reduces a batch to a scalar. {LOSSES}"),
        ({"loss": f"{OWN}Net"}, f"{OWN}Net has no reduction. {LOSSES}"),
        ({"metric": f"{OWN}raising"}, "the metric raising on the test set: KeyError: 'no such sc"),
        ({"metric": "torch.nn:Linear"}, "torch.nn:Linear is a class that needs arguments: name a"),
        ({"optimizer": "Adamant"}, "--optimizer Adamant: torch.optim has no such class; give one,"),
        ({"optimizer": "Adam", "momentum": 0.9}, "--optimizer Adam takes no --momentum"),
        ({"optimizer": "LBFGS"}, "--optimizer LBFGS: TypeError: LBFGS.step() missing 1 required"),
        ({"schedule": "StepLR"}, "--schedule StepLR: no class of torch.optim.lr_scheduler of this"),
        ({"batch_size": 65}, f"--batch-size 65 is larger than the training set of {OWN}numbers ("),
        (
            {"epsilon": 1e-9, "delta": 1e-9},
            "no noise multiplier reaches --epsilon 1e-09 at --delta",
        ),
    ],
)
def test_mistakes_are_told_in_one_line_before_training(given, text, monkeypatch):
    monkeypatch.setattr(trial, "problem_of", lambda *args: pytest.fail("training has begun"))
    usual = {
        "model": f"{OWN}regression",
        "data": f"{OWN}numbers",
        "loss": "torch.nn:MSELoss",
        "arms": ["backprop"],
    }
    with pytest.raises(UsageError) as caught:
        compare(**{**usual, **SHORT, **given})
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


def test_names_that_do_not_go_together(capsys):
    for line, text in {
        "--data a:b": "--data needs --model, a model that fits it",
        "--data a:b --model a:c --dataset mnist": "--data and --dataset are two ways to name",
    }.items():
        assert main(["ab", *line.split()]) == 2
        assert text in capsys.readouterr().err


def test_a_model_that_no_private_arm_trains(capsys):
    own = f"--model {OWN}BatchNormed --data {OWN}pictures --batch-size 16 --epochs 1"
    arms = "--arms non-private flat ghost backprop --plot none --delta 0.01"
    assert main(["ab", *own.split(), *arms.split()]) == 2
    first, *reasons = capsys.readouterr().err.splitlines()
    assert first == f"opacus-bpclip ab: error: no private arm can train {OWN}BatchNormed:"
    assert [line.partition(":")[0] for line in reasons] == ["- flat, ghost", "- backprop"]
    assert "BatchNorm" in reasons[0]
    assert 'get_compatible_module(model, clipping="backprop")' in reasons[1]


def test_the_arms_of_a_built_in_data_set_are_not_more():
    assert Settings().arms != OWN_ARMS
    assert Settings(model="a:b").arms == OWN_ARMS


def test_an_example_keeps_a_loss_of_its_own():
    """The mean over examples of each one's mean over what counts, as the arms need it."""
    losses = task_of(
        Settings(model="a:b", data=f"{OWN}numbers", loss="a:c"),
        {"model": nn.Linear(4, 1), "loss": nn.CrossEntropyLoss(ignore_index=0)},
    ).criterion
    outputs = torch.randn(2, 3, 4, requires_grad=True)
    targets = torch.tensor([[1, 2, 0, 0], [1, 2, 1, 2]])
    of_each = nn.functional.cross_entropy(outputs, targets, reduction="none")
    expected = torch.stack([of_each[0, :2].mean(), of_each[1].mean()])
    torch.testing.assert_close(losses(outputs, targets), expected.mean())
    losses.reduction = "none"
    torch.testing.assert_close(losses(outputs, targets), expected)
