"""A user's own model and data: what trains, by which arms, and what the table says."""

import itertools
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from opacus_bpclip import compare
from opacus_bpclip.__main__ import main
from opacus_bpclip.ab import training, trial
from opacus_bpclip.ab.metrics import Accuracy
from opacus_bpclip.ab.results import Plan
from opacus_bpclip.ab.settings import OWN_ARMS, Settings
from opacus_bpclip.ab.task import task_of
from opacus_bpclip.jobs.errors import UsageError
from tests.ab import stranger
from tests.ab.stranger import OWN, SHORT, notes


def compared(model, data, **options):
    return compare(f"{OWN}{model}", f"{OWN}{data}", **{**SHORT, **options})


def test_opacus_modes_train_a_cnn_in_parts_of_a_batch():
    """With an optimizer and a schedule by name."""
    arms = ["non-private", "flat", "ghost", "ew", "per_layer", "backprop"]
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


def drawn(settings):
    """Return what a process of its own would draw."""
    random.seed()
    np.random.seed()
    torch.seed()
    task = task_of(settings, {"model": NumpyWeights, "data": permuted})
    arm = training.start("non-private", 3, settings, PLAN, task)
    return task.train.indices, arm.model.weight[0, 0].item()


class NumpyWeights(nn.Linear):
    """Its weights are not drawn by torch."""

    def __init__(self):
        super().__init__(4, 2)
        self.weight.data.fill_(np.random.randn() + random.random())


def permuted():
    data = TensorDataset(torch.randn(20, 4), torch.arange(20) % 2)
    order = np.random.permutation(20).tolist()
    return Subset(data, order[:16]), Subset(data, order[16:])


PLAN = Plan(0.5, 2, None, (), 10, 16, 4)


def test_each_process_draws_the_same_data_and_weights():
    settings = Settings(model="a:b", data="a:c", **SHORT)
    assert drawn(settings) == drawn(settings)


def test_a_metric_that_is_no_number_is_kept_in_the_file(tmp_path):
    data = TensorDataset(torch.randn(20, 4), torch.arange(20) % 2)
    values = itertools.chain([0.0, math.nan, -math.inf], itertools.repeat(0.0))
    given = {"arms": ["non-private", "flat"], "json": tmp_path / "r.json", **SHORT}

    def metric(outputs, targets):
        return next(values)

    first = compare(nn.Linear(4, 2), (data, data), metric=metric, **given)
    again = compare(nn.Linear(4, 2), (data, data), metric=metric, resume=True, **given)
    assert str(first.rows) == str(again.rows)
    assert [str(row.metric) for row in again.rows] == ["nan", "-inf"]


def test_ignored_targets_do_not_count_and_probabilities_are_compared_by_their_largest():
    outputs = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    accuracy = Accuracy()
    accuracy.update(outputs, torch.tensor([0, 0, -100]))
    assert accuracy.compute() == 0.5
    accuracy.update(outputs, torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]))
    assert accuracy.compute() == 0.8


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "a part"])
def test_a_model_in_evaluation_mode_is_trained(whole):
    data = TensorDataset(torch.randn(20, 4), torch.arange(20) % 2)
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), nn.Linear(4, 2))
    (model if whole else model[0]).eval()
    table = compare(model, (data, data), arms=["flat", "ghost", "backprop"], **SHORT)
    assert notes(table) == {}
    assert not model[0].training
