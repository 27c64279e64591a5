"""A transform of the training inputs, and several views of each: who trains on them, and how."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from opacus_bpclip import FoldViews, compare
from opacus_bpclip.ab.settings import Settings
from opacus_bpclip.ab.study.file import read_study
from opacus_bpclip.ab.task import task_of
from opacus_bpclip.ab.transforms import shifts, shifts_and_flips
from opacus_bpclip.jobs.errors import UsageError
from tests.ab.stranger import OWN, SHORT, notes

TRANSFORMS = "opacus_bpclip.ab.transforms:"
STUDIES = Path(__file__).parents[2] / "benchmarks/studies"


def compared(**options):
    return compare(f"{OWN}Net", f"{OWN}pictures", **{**SHORT, **options})


def test_views_train_the_arms_that_measure_them_together_and_the_others_say_why():
    arms = ["non-private", "flat", "ghost", "backprop"]
    table = compared(
        arms=arms, views=3, transform=f"{TRANSFORMS}shifts", physical_batch_size=5, max_input_norm=4
    )
    told = notes(table)
    assert set(told) == {"flat", "ghost"}
    for note in told.values():
        assert note.startswith("ValueError: FoldViews makes several rows of each example")
    for row in table.rows:
        assert (row.metric is None) == (row.arm in told)
        assert row.metric is None or row.arm == "non-private" or 2.9 < row.epsilon <= 3
    assert f"inputs of 3 views by {TRANSFORMS}shifts" in str(table)


def test_one_view_is_for_all_arms():
    arms = ["non-private", "flat", "ghost", "backprop"]
    table = compared(arms=arms, transform=lambda x: x + torch.randn_like(x))
    assert notes(table) == {}
    metrics = {row.arm: row.metric for row in table.rows}
    # One noise, one clipping, and the same views of the same items.
    assert metrics["flat"] == metrics["ghost"] == metrics["backprop"]


def test_the_test_set_and_held_out_examples_are_as_they_were():
    def zeros(x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    given = {"model": f"{OWN}Net", "data": f"{OWN}pictures", "transform": "own", "views": 2}
    task = task_of(Settings(**given), {"transform": zeros})
    x, y = next(iter(task.loader(4)))
    assert x.shape == (4, 2, 1, 8, 8)
    assert y.shape == (4, 2)
    assert not x.any()
    assert task.train[0][0].any()
    assert next(iter(task.test_batches(4)))[0].any()
    assert isinstance(task.new_model(), FoldViews)
    assert not isinstance(task.model(), FoldViews)


def test_a_pretrained_model_in_evaluation_mode_gets_views_all_the_same():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
    table = compare(model, f"{OWN}pictures", arms=["backprop"], transform=shifts, views=2, **SHORT)
    assert notes(table) == {}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"views": 2}, ValueError, "--views needs --transform: without one, all views"),
        ({"views": 0, "transform": shifts}, ValueError, "views"),
        ({"transform": f"{OWN}pictures"}, UsageError, "is neither a function of an input nor"),
        ({"transform": lambda x: 1 / 0}, UsageError, "--transform"),
        (
            {"transform": lambda x: x.tolist(), "views": 2},
            UsageError,
            "returns a list, and not a tensor",
        ),
    ],
)
def test_mistakes_are_told_before_training(options, error, message):
    with pytest.raises(error, match=message):
        compared(arms=["backprop"], **options)


@pytest.mark.parametrize("size", [8, 32])
def test_pictures_are_shifted_by_at_most_an_eighth(size):
    torch.manual_seed(0)
    rows = torch.arange(size).float()[:, None].expand(1, size, size)
    shifted = torch.stack([shifts()(rows) for _ in range(100)]) - rows
    most = size // 8
    middle = shifted[:, 0, most : size - most, 0]
    assert set(middle.flatten().tolist()) == set(range(-most, most + 1))
    columns = rows.mT
    both = [shifts_and_flips()(columns)[0, 0] for _ in range(100)]
    mirrored = sum(float(own.diff()[size // 2]) < 0 for own in both)
    assert 30 <= mirrored <= 70
    assert {own.shape for own in both} == {(size,)}


def test_the_cifar_study_has_an_arm_with_views():
    study = read_study(STUDIES / "cifar10-jpeg-arms.toml")
    settings = study.published("eps3", "joint-views", {})[0]
    assert (settings.views, settings.arm) == (4, "backprop")
    assert settings.transform == f"{TRANSFORMS}shifts_and_flips"
    assert study.published("eps3", "joint", {})[0].views == 1
