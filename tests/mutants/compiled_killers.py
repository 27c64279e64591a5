"""Killers of mutants of what vouches for compiled graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping
from tests.checks import HUGE, Trainer, check_refused


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return HUGE * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return HUGE * g


class _Ways(nn.Module):
    """Uses its layer, and by a flag also the layer's weight, as no rule knows."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.use = nn.Linear(2, 2), use

    def forward(self, x: Tensor, beside: bool = False) -> Tensor:
        y = self.layer(x)
        return y + self.use(x, self.layer.weight) if beside else y


def _check(use: Callable[[Tensor, Tensor], Tensor], *, eager: bool, then: bool) -> None:
    torch.manual_seed(0)
    trainer = Trainer(_Ways(use), (2,), BackpropClipping(), probe=True)
    x = torch.ones(1, 2).double()
    if eager:
        trainer.model(x, beside=False).sum().backward()
        trainer.optimizer.step()
    torch._dynamo.reset()
    call = torch.compile(trainer.model, backend="aot_eager")

    def loss(_: Tensor, model: nn.Module) -> Tensor:
        made: Tensor = call(x, beside=True).sum()
        if then:
            call(x)
        return made

    check_refused(trainer, x, loss)
    torch._dynamo.reset()


def gradient_beside_a_layer_in_a_graph() -> None:
    """A compiled model whose forward uses a weight by an autograd function of its own."""
    _check(lambda x, w: x * _Hidden.apply(w).sum(), eager=False, then=False)


def graph_of_a_flag_that_no_batch_had() -> None:
    """The same by a function of torch, in a way of calling the model that is compiled only."""
    _check(lambda x, w: HUGE * F.linear(x, w), eager=True, then=False)


def graph_behind_another_one() -> None:
    """The same, and a call after it in which there is nothing wrong."""
    _check(lambda x, w: HUGE * F.linear(x, w), eager=False, then=True)
