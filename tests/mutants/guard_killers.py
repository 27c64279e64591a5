"""Killers of mutants of the guard: gradients that no layer's rule has bounded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping
from tests.budgets import layerwise
from tests.checks import HUGE, Trainer, check_refused, check_unmoved
from tests.refusals import check_raises


def _two_layers() -> tuple[Trainer, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    return Trainer(model, (2,), layerwise()), torch.ones(3, 2).double()


def weight_beside_its_layer() -> None:
    """A loss that uses a weight a second time, by `F.linear`."""
    trainer, x = _two_layers()
    check_refused(trainer, x, lambda y, model: y.sum() + F.linear(x, model[1].weight).sum())


def weight_beside_its_layer_after_a_good_batch() -> None:
    """The same loss, after a batch that the guard has found nothing wrong with."""
    trainer, x = _two_layers()
    trainer.step(x, torch.ones(3, 2).double())
    check_refused(trainer, x, lambda y, model: y.sum() + F.linear(x, model[1].weight).sum())


def model_in_lower_precision() -> None:
    """A model that is turned to bfloat16 after `make_private`, with a mean loss."""
    trainer, x = _two_layers()
    trainer.plain.bfloat16()
    check_refused(trainer, x.bfloat16(), lambda y, _: y.sum())


def frozen_within_a_logical_batch() -> None:
    """A layer that is frozen in the second part of a logical batch, and trains in the next one."""
    trainer, x = _two_layers()
    target = torch.ones(3, 2).double()
    trainer.step(x, target)
    expected = [p.summed_grad.clone() for p in trainer.plain.parameters()]
    for skip, trains in ((True, True), (False, False)):
        trainer.plain[0].requires_grad_(trains)
        trainer.optimizer.signal_skip_step(skip)
        trainer.step(x, target)
    trainer.optimizer.zero_grad()
    trainer.plain[0].requires_grad_(True)
    trainer.loss(trainer.model(x), target, trainer.reduction).backward()
    trainer.optimizer.step()
    for (name, p), own in zip(trainer.plain.named_parameters(), expected, strict=True):
        assert torch.equal(p.summed_grad, own), f"{name}: more than the sum of its own sample"


def layer_added_later() -> None:
    """A layer that is put into the model after `make_private`, and trained by a plain optimizer."""
    trainer, x = _two_layers()
    trainer.plain.append(nn.Linear(2, 2).double())
    check_refused(trainer, x, lambda y, _: y.sum())


def gradient_there_before() -> None:
    """A gradient in ``p.grad`` from before, to which the batch's would be added."""
    trainer, x = _two_layers()

    def loss(y: Tensor, model: nn.Module) -> Tensor:
        model[1].weight.grad = torch.ones(2, 2).double()
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


class _Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x), self.right(x)


def heads_backward_apart() -> None:
    """A backward pass from one output of a model, and one from the other, with a joint budget."""
    torch.manual_seed(0)
    trainer = Trainer(_Heads(), (2,), BackpropClipping())
    trainer.model.allow_grad_accumulation()

    def loss(y: tuple[Tensor, Tensor], _: nn.Module) -> Tensor:
        y[0].sum().backward(retain_graph=True)
        return y[1].sum()

    check_refused(trainer, torch.ones(3, 2).double(), loss)


def gradient_set_by_hand() -> None:
    """A gradient put into `p.grad` between the backward pass and the step."""
    trainer, x = _two_layers()
    check_unmoved(trainer, x, lambda p: setattr(p, "grad", torch.full_like(p, HUGE)))


def statistics_of_a_pass_without_gradients() -> None:
    """A frozen batch normalisation, in training mode where nothing asks for gradients."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(2, affine=False)
    model = nn.Sequential(nn.Linear(2, 2), norm.eval(), nn.Linear(2, 2))
    trainer = Trainer(model, (2,), layerwise())
    norm.train()
    with torch.no_grad():
        check_raises(
            lambda: trainer.model(torch.ones(3, 2).double()),
            "running statistics",
            otherwise="statistics without noise were taken up",
        )
