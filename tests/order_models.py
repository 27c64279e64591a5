"""Models whose layers get the examples in another order, and the messages about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from opacus_bpclip.model.coverage import trainable_layers
from opacus_bpclip.probe import Batch, find_coupling
from tests.helpers import CLASSES, FEATURES
from tests.probing import made_up

STEPS = 6


def turned(order: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def move(x: Tensor) -> tuple[Tensor, Tensor]:
        there = order(x)
        return there, there.argsort()

    return move


def refusal(model: nn.Module, batch: Batch | None = None) -> str | None:
    """Return the message about a model under a joint budget."""
    batch = batch or made_up(torch.zeros(2, FEATURES))
    layers = trainable_layers(model, batch_first=batch.axis == 0).values()
    problem = find_coupling(model, batch, loss_reduction="mean", layers=layers)
    return None if problem is None else problem.text


ORDERS = {
    "flipped": lambda x: torch.arange(len(x)).flip(0),
    "rolled": lambda x: torch.arange(len(x)).roll(1),
    "rolled by half": lambda x: torch.arange(len(x)).roll(len(x) // 2),
    "rolled by a random number": lambda x: torch.arange(len(x)).roll(
        int(torch.randint(len(x), ()))
    ),
    "last two changed": lambda x: torch.cat(
        [torch.arange(len(x) - 2), torch.tensor([len(x) - 1, len(x) - 2])]
    ),
    "neighbours changed": lambda x: torch.arange(len(x)) ^ 1,
    "sorted": lambda x: x[:, 0].argsort(),
    "sorted backwards": lambda x: x.sum(dim=1).argsort(descending=True),
    "shuffled": lambda x: torch.randperm(len(x)),
    "shuffled by numbers": lambda x: torch.rand(len(x)).argsort(),
    "shuffled by numbers backwards": lambda x: torch.rand(len(x)).argsort(descending=True),
}


ORDERS_OF_SEQUENCES = {
    "where zeros end": lambda x, mask: (x != 0).any(dim=2).sum(dim=1),
    "how much is masked": lambda x, mask: mask.sum(dim=1),
    "whether all is masked": lambda x, mask: mask.any(dim=1).long(),
}


class Moved(nn.Module):
    """Moves its examples before the second of three layers, and back after it."""

    def __init__(self, move: Callable[[Tensor], tuple[Tensor, Tensor]], dtype: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(FEATURES, 5), nn.Linear(5, 5)
        self.head, self.move, self.dtype = nn.Linear(5, CLASSES), move, dtype

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        assert self.dtype in (None, h.dtype)
        there, back = self.move(x)
        return self.head(torch.tanh(self.second(h[there])[back]))
