"""Killers of mutants of views."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from opacus_bpclip import AugmentedViews, BackpropClipping, CoverageError, FoldViews
from tests.checks import HUGE, Trainer, check_sensitivity, joint
from tests.views.viewed import Viewed


def equal_views_through_two_layers() -> None:
    """An example whose three views are equal, and large."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    trainer = Viewed(model, (4,), BackpropClipping(), views=3)
    x = torch.randn(2, 1, 4).double().expand(2, 3, 4)
    check_sensitivity(trainer, x, HUGE * torch.ones(2, 6).double())


def _convolution(clipping: BackpropClipping) -> Trainer:
    torch.manual_seed(0)
    return Viewed(nn.Conv1d(2, 3, 2), (2, 6), clipping, views=2, reduction="sum")


def large_second_view_of_a_convolution() -> None:
    """An example through a convolution, the second of whose views has a large gradient, in the
    weighted bound."""
    trainer = _convolution(BackpropClipping(bound="weighted"))
    target = torch.ones(1, 15, 2).double()
    target[:, :, 1] = HUGE
    check_sensitivity(trainer, torch.randn(1, 2, 2, 6).double(), target.flatten(1))


def small_first_view_by_product() -> None:
    """An example through a convolution, the second of whose views is large, in the product
    bound."""
    trainer = _convolution(BackpropClipping(bound="product", max_input_norm=1.0))
    x = 0.01 * torch.ones(1, 2, 2, 6).double()
    x[:, 1] = HUGE
    check_sensitivity(trainer, x, HUGE * torch.ones(1, 30).double())


def _check_mean(trainer: Trainer, model: nn.Module, x: Tensor, y: Tensor) -> None:
    found = joint(trainer.released(x, y))
    total = torch.zeros_like(found)
    for views, labels in zip(x, y, strict=True):
        own = torch.autograd.grad(F.cross_entropy(model(views), labels), list(model.parameters()))
        total += torch.cat([g.flatten() for g in own])
    apart = (found - total).norm() / total.norm()
    assert apart < 1e-9, f"the sum differs from the mean over the views by {apart}"


def views_of_a_group_norm() -> None:
    """Examples far below the limit through a group norm: the sum of their gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    plain = copy.deepcopy(model)
    trainer = Viewed(
        model,
        (2, 6),
        BackpropClipping(),
        views=3,
        max_grad_norm=1e3,
        loss=lambda output, target, _: F.cross_entropy(output, target),
    )
    _check_mean(trainer, plain, torch.randn(4, 3, 2, 6).double(), torch.randint(3, (4, 3)))


def views_behind_a_criterion() -> None:
    """Examples far below the limit, whose loss a criterion computes: the sum of their gradients."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    plain = copy.deepcopy(model)
    trainer = Viewed(
        model,
        (4,),
        BackpropClipping(),
        views=2,
        max_grad_norm=1e3,
        criterion=nn.CrossEntropyLoss(),
    )
    _check_mean(trainer, plain, torch.randn(4, 2, 4).double(), torch.randint(3, (4, 2)))


def evaluation_mode_in_the_backward_pass() -> None:
    """One example, whose three large views are equal, through a group norm. The model is put into
    evaluation mode between its forward pass and the backward pass."""
    torch.manual_seed(0)
    model = nn.GroupNorm(1, 2)
    trainer = Viewed(model, (2, 4), BackpropClipping(), views=3)
    trainer.optimizer.zero_grad()
    output = trainer.model(torch.randn(1, 1, 2, 4).double().expand(1, 3, 2, 4))
    trainer.model.eval()
    (HUGE * output.sum()).backward()
    trainer.optimizer.step()
    norm = torch.cat([p.summed_grad.flatten() for p in model.parameters()]).norm()
    assert norm <= 1 + 1e-9, f"one example contributed {norm}, and 1 was claimed"


class _Interleaved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x)).unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
        return self.second(y).unflatten(0, (3, -1)).transpose(0, 1).flatten(0, 1)


def interleaved_views() -> None:
    """A model whose second layer has the first views of all examples before the second ones, with a
    budget for each layer."""
    torch.manual_seed(0)
    clipping = BackpropClipping(allocation="equal")
    try:
        Trainer(FoldViews(_Interleaved(), 3), (3, 4), clipping, probe=True)
    except CoverageError:
        return
    raise AssertionError("a layer that measures views of several examples together was accepted")


def items_that_draw_random_numbers() -> None:
    """Items whose transform adds random numbers, read alone and after another item."""
    data = [
        AugmentedViews(TensorDataset(torch.zeros(4, 2), torch.zeros(4)), _noisy, 2, seed=0)
        for _ in range(2)
    ]
    torch.manual_seed(0)
    data[0][1]
    after, _ = data[0][3]
    torch.manual_seed(0)
    alone, _ = data[1][3]
    assert torch.equal(after, alone), "an item's views depend on what was read before"


def _noisy(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)
