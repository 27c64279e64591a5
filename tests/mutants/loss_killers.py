"""Killers of mutants that let the batch's size through: in a loss, or in rounding that grows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_bpclip.losses.criterion import BackpropClipCriterion
from opacus_bpclip.probe.rows import rows_are_coupled
from opacus_bpclip.rules import GroupNormRule
from tests.budgets import layerwise
from tests.checks import (
    Trainer,
    check_independence,
    check_refused,
    check_sensitivity,
)
from tests.companions import Criterion, blank_and_one, check_rounding_is_small, mixer
from tests.refusals import check_raises


class _Classes(nn.Module):
    """Cross-entropy of classes that are given as floats, as the checks have their targets."""

    def __init__(self) -> None:
        super().__init__()
        self.reduction = "mean"

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target.long(), reduction=self.reduction)


def criterion_together_and_alone() -> None:
    """A batch through two layers and a criterion, far below the limits, and its examples one by
    one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    trainer = Trainer(model, (4,), layerwise(), criterion=_Classes(), max_grad_norm=100.0)
    x, target = torch.randn(5, 4).double(), torch.tensor([0.0, 1, 1, 0, 1]).double()
    check_independence(trainer, x, target)


def loss_around_the_criterion() -> None:
    """A plain mean where `make_private` was given a criterion."""
    torch.manual_seed(0)
    trainer = Trainer(nn.Linear(2, 2), (2,), layerwise(), criterion=_Classes())
    check_refused(trainer, torch.ones(3, 2).double(), lambda y, _: y.square().mean())


def flattened_rows() -> None:
    """A loss over the positions of all examples in one list, where a row is no example."""
    torch.manual_seed(0)
    trainer = Trainer(nn.Linear(2, 2), (3, 2), layerwise(), criterion=_Classes())

    def loss(y: Tensor, _: nn.Module) -> Tensor:
        return trainer.loss(y.flatten(0, 1), torch.zeros(9).double(), "mean")

    try:
        check_refused(trainer, torch.ones(3, 3, 2).double(), loss)
    except ValueError:
        return


def blank_companions() -> None:
    """A thousand blank images through normalisations of constants, behind a plain mean, and one
    more."""
    trainer = Trainer(
        mixer(),
        (3, 32, 32),
        layerwise(),
        loss=Criterion("cross-entropy").plain,
        dtype=torch.float32,
    )
    check_sensitivity(trainer, *blank_and_one(1023, (3, 32, 32)))


def positions_that_cancel_in_a_norm() -> None:
    """A group norm's own gradient, of which only rounding errors are left."""
    check_rounding_is_small(nn.GroupNorm(2, 2), "weighted")


def positions_that_cancel_in_a_convolution() -> None:
    """A convolution's own gradient in the exact bound, of which only rounding errors are left."""
    check_rounding_is_small(nn.Conv1d(2, 2, 1), "exact")


def long_group_of_equal_gradients() -> None:
    """A gradient that is the same at 50,176 positions of a group, through a group norm."""
    rule = GroupNormRule.from_module(nn.GroupNorm(1, 1))
    x, g = torch.ones(1, 1, 50176), torch.full((1, 1, 50176), 0.3)
    left = float(rule.input_gradient(g, x, torch.ones(1)).abs().max())
    assert left == 0, f"{left} is left where nothing is"


class _Boxes(nn.Module):
    """The distance of outputs to a list of each example's boxes, by how many the batch has."""

    reduction = "none"

    def forward(self, output: Tensor, target: list[Tensor]) -> Tensor:
        losses = [(output[index] - own).abs().sum() for index, own in enumerate(target)]
        return torch.stack(losses) / sum(map(len, target))


def lists_of_boxes() -> None:
    """A criterion that divides by how many boxes there are in a list with an item for each
    example."""
    boxes = [torch.ones(number, 2) for number in (1, 5, 2, 9)]
    found = rows_are_coupled(_Boxes(), (torch.zeros(4, 2), boxes), {}, 4)
    assert found, "the number of boxes was not found"


class _Switched(nn.Module):
    """Subtracts the batch's mean loss, once it is switched on."""

    reduction, coupled = "mean", False

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(output, target.long(), reduction="none")
        return (losses - losses.mean()).square() if self.coupled else losses


def criterion_that_is_switched_on() -> None:
    """A criterion that compares examples with the batch from some epoch on."""
    torch.manual_seed(0)
    criterion = BackpropClipCriterion(_Switched())
    output, target = torch.randn(6, 3), torch.zeros(6)
    criterion(output, target)
    criterion.criterion.coupled = True
    check_raises(
        lambda: criterion(output, target),
        "couples examples",
        otherwise="a criterion that couples examples was accepted",
    )
