"""Checks that wrong precision fails."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping
from opacus_bpclip.rules import RULES, LinearRule, precision
from tests.checks import Trainer, check_independence, check_refused

_LOW = torch.bfloat16


def many_examples_in_low_precision() -> None:
    """The sum over 64 examples in bfloat16 is the sum of what each contributes alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    trainer = Trainer(model, (4,), BackpropClipping(), reduction="sum", dtype=_LOW)
    check_independence(trainer, torch.randn(64, 4).to(_LOW), torch.randn(64, 2).to(_LOW))


def own_layer_that_rounds() -> None:
    """The sum over 256 examples of a layer with a rule that turns its numbers to bfloat16."""

    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            weight, bias = self.weight.to(_LOW), self.bias.to(_LOW)
            return nn.functional.linear(x.to(_LOW), weight, bias).float()

    torch.manual_seed(0)
    RULES[Own] = LinearRule
    try:
        model = nn.Sequential(Own(4, 2))
        trainer = Trainer(model, (4,), BackpropClipping(), reduction="sum", dtype=torch.float32)
        check_independence(trainer, torch.randn(256, 4), torch.randn(256, 2))
    finally:
        del RULES[Own]


def mean_of_a_rounded_parameter() -> None:
    """A mean loss of a model that rounds a parameter before it meets the batch."""

    class Derived(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.w.to(_LOW).float())

    trainer = _two_layers(Derived())
    check_refused(trainer, torch.ones(3, 2), lambda y, _: y.mean())


def mean_under_autocast() -> None:
    """A mean loss under autocast."""
    trainer = _two_layers()

    def loss(y: Tensor, model: nn.Module) -> Tensor:
        with torch.autocast("cpu", _LOW):
            return trainer.model(torch.ones(3, 2)).float().square().mean()

    check_refused(trainer, torch.ones(3, 2), loss)


def mean_of_rounded_products() -> None:
    """A mean loss where torch may round the factors of products to bfloat16."""
    trainer = _two_layers()
    torch.set_float32_matmul_precision("medium")
    # Whether this machine does so or not.
    found, precision._rounds_products = precision._rounds_products, lambda *_: True
    try:
        check_refused(trainer, torch.ones(3, 2), lambda y, _: y.mean())
    finally:
        precision._rounds_products = found
        torch.set_float32_matmul_precision("highest")


def _with_unclipped_gradients() -> Trainer:
    clipping = BackpropClipping(allocation="equal", propagate="unclipped")
    return Trainer(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), (2,), clipping)


def option_of_a_model_cast_later() -> None:
    """A mean loss and gradients that are passed on unclipped, in single precision since a cast."""
    trainer = _with_unclipped_gradients()
    trainer.plain.float()
    check_refused(trainer, torch.ones(3, 2), lambda y, _: y.mean())


def option_behind_a_rounded_loss() -> None:
    """The same in double precision, with a loss in single precision."""
    trainer = _with_unclipped_gradients()
    check_refused(trainer, torch.ones(3, 2).double(), lambda y, _: y.float().square().mean())


def mean_of_very_many() -> None:
    """A mean loss over 2,049 examples of 5,000 that are expected."""
    trainer = _two_layers()
    trainer.optimizer.expected_batch_size = 5000
    check_refused(trainer, torch.ones(2049, 2), lambda y, _: y.mean())


def mean_rounded_between_layers() -> None:
    """A mean loss whose gradient is rounded between layers in float32."""

    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(_LOW).float()

    trainer = _two_layers(Cast())
    check_refused(trainer, torch.ones(3, 2), lambda y, _: y.mean())


def _two_layers(*between: nn.Module) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), *between, nn.Linear(2, 2))
    return Trainer(model, (2,), BackpropClipping(), dtype=torch.float32)
