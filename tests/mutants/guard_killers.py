"""Killers of mutants of the guard: gradients that no layer's rule has bounded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.budgets import layerwise
from tests.checks import HUGE, Trainer, check_refused, check_unmoved


def _two_layers() -> tuple[Trainer, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    return Trainer(model, (2,), layerwise()), torch.ones(3, 2).double()


def weight_beside_its_layer() -> None:
    """A loss that uses a weight a second time, by `F.linear`."""
    trainer, x = _two_layers()
    check_refused(trainer, x, lambda y, model: y.sum() + F.linear(x, model[1].weight).sum())


def weight_instead_of_its_layer() -> None:
    """A loss that uses a weight alone."""
    trainer, x = _two_layers()
    check_refused(trainer, x, lambda y, model: model[1].weight.square().sum())


def gradient_changed_after_the_clip() -> None:
    """A hook that multiplies a clipped gradient on its way to the layer."""
    trainer, x = _two_layers()

    def loss(y: Tensor, _: nn.Module) -> Tensor:
        y.grad_fn.register_hook(lambda inputs, _: tuple(g if g is None else 9 * g for g in inputs))
        return y.sum()

    check_refused(trainer, x, loss)


def two_batches_in_one_step() -> None:
    """A second Poisson batch before the step: an example may be in both."""
    trainer, x = _two_layers()

    def loss(y: Tensor, _: nn.Module) -> Tensor:
        y.sum().backward()
        return trainer.model(x).sum()

    check_refused(trainer, x, loss)


def one_batch_backward_twice() -> None:
    """Two backward passes through one forward pass, where several batches may add up."""
    trainer, x = _two_layers()
    trainer.model.allow_grad_accumulation()

    def loss(y: Tensor, _: nn.Module) -> Tensor:
        y.sum().backward(retain_graph=True)
        return y.sum()

    check_refused(trainer, x, loss)


def gradient_set_by_hand() -> None:
    """A gradient put into `p.grad` between the backward pass and the step."""
    trainer, x = _two_layers()
    check_unmoved(trainer, x, lambda p: setattr(p, "grad", torch.full_like(p, HUGE)))
