"""A stranger's mistakes are told in one line, before training where they can be known."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from opacus_bpclip import compare
from opacus_bpclip.__main__ import main
from opacus_bpclip.ab import trial
from opacus_bpclip.jobs.errors import UsageError
from tests.ab.stranger import OWN, SHORT, notes

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


def coupled(outputs, targets):
    return (outputs - targets.float().unsqueeze(1) - outputs.mean()).square().mean(dim=1)


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (coupled, "tests.ab.test_own_mistakes:coupled couples examples"),
        (nn.MSELoss, "torch.nn.modules.loss:MSELoss broadcasts outputs of shape"),
    ],
)
def test_a_loss_that_couples_examples_is_refused_for_all_arms(loss, text, recwarn):
    data = TensorDataset(torch.randn(20, 4), torch.randn(20))
    with pytest.raises(UsageError, match=text):
        compare(nn.Linear(4, 1), (data, data), loss=loss, arms=["flat"], **SHORT)


def test_what_cannot_be_compared_says_so():
    data = TensorDataset(torch.randn(20, 4), torch.arange(20) % 2)
    with pytest.raises(UsageError, match="has lazy layers: run a batch through the model before"):
        compare(nn.LazyLinear(2), (data, data), arms=["flat"], **SHORT)
    table = compare(
        nn.Linear(4, 2), (data, data), arms=["flat", "adaptive"], physical_batch_size=4, **SHORT
    )
    assert notes(table)["adaptive"].endswith("leave out --physical-batch-size")
    with pytest.raises(ValueError, match=r"^--arms flt: must be 'non-private', 'flat', "):
        compare(nn.Linear(4, 2), (data, data), **{**SHORT, "arms": ["flt"]})
