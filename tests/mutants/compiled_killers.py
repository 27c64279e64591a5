"""Killers of mutants of the checks of compiled graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping
from tests.checks import Trainer, check_refused


class _Ways(nn.Module):
    """Rounds a mean's gradients by a flag, between layers, where a graph does not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor, low: bool = False) -> Tensor:
        y = self.layer(x)
        return self.head(y.bfloat16().float() if low else y)


def _trainer(model: nn.Module) -> Trainer:
    torch.manual_seed(0)
    return Trainer(model, (2,), BackpropClipping(), probe=True, dtype=torch.float32)


def _check(*, then: bool) -> None:
    trainer, x = _trainer(_Ways()), torch.ones(1, 2)
    torch._dynamo.reset()
    call = torch.compile(trainer.model, backend="aot_eager")

    def loss(_: Tensor, model: nn.Module) -> Tensor:
        made: Tensor = call(x, low=True).sum()
        if then:
            call(x)
        return made

    check_refused(trainer, x, loss)
    torch._dynamo.reset()


def roundings_in_a_graph() -> None:
    """A compiled model that rounds a mean's gradients."""
    _check(then=False)


def graph_behind_another_one() -> None:
    """The same, and a call after it in which there is nothing wrong."""
    _check(then=True)
