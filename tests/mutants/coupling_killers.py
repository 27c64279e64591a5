"""Killers of mutants that let examples meet: batches together and alone, finite or not."""

from __future__ import annotations

import torch
from torch import nn

from tests.budgets import layerwise
from tests.checks import HUGE, Trainer, check_independence, check_silent


def two_layers_together_and_alone() -> None:
    """A batch through two layers, and its examples one by one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    trainer = Trainer(model, (4,), layerwise())
    check_independence(trainer, torch.randn(5, 4).double(), torch.randn(5, 2).double() * 0.1)


def hostile_batch_together_and_alone() -> None:
    """A batch with one large example, and its examples one by one."""
    trainer = Trainer(nn.Linear(2, 2), (2,), layerwise())
    x, target = torch.ones(4, 2).double(), torch.ones(4, 2).double()
    x[-1] *= HUGE
    target[-1] *= HUGE
    check_independence(trainer, x, target)


def group_norm_together_and_alone() -> None:
    """A batch through a group norm, with one large example, and its examples one by one."""
    torch.manual_seed(0)
    trainer = Trainer(nn.GroupNorm(2, 4), (4, 3), layerwise())
    x, target = torch.randn(3, 4, 3).double(), torch.ones(3, 12).double()
    target[-1] *= HUGE
    check_independence(trainer, x, target)


def group_norm_far_from_zero_together_and_alone() -> None:
    """A batch through a group norm, far above its deviations, and its examples one by one."""
    torch.manual_seed(0)
    trainer = Trainer(nn.GroupNorm(2, 4), (4, 3), layerwise())
    x, target = 1e9 + torch.randn(3, 4, 3).double(), torch.randn(3, 12).double()
    check_independence(trainer, x, target)


def frozen_norm_far_from_zero_together_and_alone() -> None:
    """A batch through a layer whose outputs are far above their deviations, a frozen layer norm and
    another layer, and its examples one by one."""
    torch.manual_seed(0)
    first = nn.Linear(6, 6)
    nn.init.constant_(first.bias, 1e9)
    model = nn.Sequential(first, nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 2))
    trainer = Trainer(model, (6,), layerwise(max_input_norm=None))
    check_independence(trainer, torch.randn(3, 6).double(), torch.randn(3, 2).double())


def convolution_together_and_alone() -> None:
    """A batch through a convolution in the exact bound, one example large, and each by itself."""
    torch.manual_seed(0)
    trainer = Trainer(nn.Conv1d(2, 2, 1), (2, 9), layerwise(bound="exact"))
    x, target = torch.randn(3, 2, 9).double(), torch.ones(3, 18).double()
    target[-1] *= HUGE
    check_independence(trainer, x, target)


def upstream_of_a_sequence_not_finite() -> None:
    """An example, a sequence, whose upstream gradient is infinite, in the exact bound."""
    trainer = Trainer(nn.Linear(2, 2), (9, 2), layerwise(bound="exact"))
    target = torch.ones(3, 18, dtype=torch.float64)
    target[-1, 0] = float("inf")
    check_silent(trainer, torch.ones(3, 9, 2, dtype=torch.float64), target)


def input_not_finite() -> None:
    """An example with nan in its input."""
    trainer = Trainer(nn.Linear(2, 2), (2,), layerwise())
    x = torch.ones(3, 2, dtype=torch.float64)
    x[-1, 0] = float("nan")
    check_silent(trainer, x, torch.ones(3, 2, dtype=torch.float64))


def upstream_not_finite() -> None:
    """An example whose upstream gradient is infinite."""
    trainer = Trainer(nn.Linear(2, 2), (2,), layerwise())
    target = torch.ones(3, 2, dtype=torch.float64)
    target[-1, 0] = float("inf")
    check_silent(trainer, torch.ones(3, 2, dtype=torch.float64), target)
