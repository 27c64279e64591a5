"""Killers of mutants of the criterion: losses that divide by the batch's size, or go around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping
from tests.checks import Trainer, check_independence, check_refused


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
    trainer = Trainer(model, (4,), BackpropClipping(), criterion=_Classes(), max_grad_norm=100.0)
    x, target = torch.randn(5, 4).double(), torch.tensor([0.0, 1, 1, 0, 1]).double()
    check_independence(trainer, x, target)


def loss_around_the_criterion() -> None:
    """A plain mean where `make_private` was given a criterion."""
    torch.manual_seed(0)
    trainer = Trainer(nn.Linear(2, 2), (2,), BackpropClipping(), criterion=_Classes())
    check_refused(trainer, torch.ones(3, 2).double(), lambda y, _: y.square().mean())


def flattened_rows() -> None:
    """A loss over the positions of all examples in one list, of whose rows none is an example."""
    torch.manual_seed(0)
    trainer = Trainer(nn.Linear(2, 2), (3, 2), BackpropClipping(), criterion=_Classes())

    def loss(y: Tensor, _: nn.Module) -> Tensor:
        return trainer.loss(y.flatten(0, 1), torch.zeros(9).double(), "mean")

    try:
        check_refused(trainer, torch.ones(3, 3, 2).double(), loss)
    except ValueError:
        return
