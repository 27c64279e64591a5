"""How the tests search a model for coupled examples, and models that several of them search."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from opacus.layers import DPLSTM
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from opacus_bpclip.probe import Batch, find_coupling
from tests.helpers import CLASSES, FEATURES


def made_up(*args: Any, axis: int = 0, **kwargs: Any) -> Batch:
    first = next(iter((*args, *kwargs.values())))
    size = int(first.batch_sizes[0]) if isinstance(first, PackedSequence) else first.shape[axis]
    return Batch(args, kwargs, size, axis).invent(4)


def found(model: nn.Module, batch: Batch | None = None, loss_reduction: str = "mean") -> str | None:
    batch = batch or made_up(torch.zeros(2, FEATURES))
    problem = find_coupling(model, batch, loss_reduction=loss_reduction)
    return None if problem is None else problem.text


class Middle(nn.Module):
    """Does something between two layers."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.head(self.function(self.body(x)))


class Returning(Middle):
    """Does something to the output."""

    def forward(self, x: Tensor) -> Any:
        return self.function(self.head(self.body(x)))


class Recurrent(nn.Module):
    def __init__(self, batch_first: bool = True, coupled: bool = False) -> None:
        super().__init__()
        self.lstm = DPLSTM(FEATURES, 6, batch_first=batch_first)
        self.axis = 0 if batch_first else 1
        self.coupled = coupled

    def forward(self, x: Tensor | PackedSequence) -> Tensor:
        y = self.lstm(x)[0]
        if isinstance(y, PackedSequence):
            y = pad_packed_sequence(y, batch_first=True)[0]
        return y - self.coupled * y.mean(dim=self.axis, keepdim=True)


class OnlyReal(nn.Module):
    """Runs only on inputs that the trial does not make up."""

    def __init__(self, coupled: bool) -> None:
        super().__init__()
        self.table, self.coupled = nn.Embedding(8, CLASSES), coupled

    def forward(self, ids: Tensor) -> Tensor:
        y = self.table(ids - 100)
        return y - self.coupled * y.mean(dim=0)


def out_of_sight(place: str) -> nn.Module:
    """Return a model that subtracts the last mean from where no search for changes looks.

    Args:
        place: ``"a class"``, ``"a global"`` or ``"an object of an object"``.
    """
    holder = SimpleNamespace(mean=torch.zeros(FEATURES))

    class Kept(nn.Module):
        mean = torch.zeros(FEATURES)

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(FEATURES, CLASSES)
            if place == "an object of an object":
                self.bank = SimpleNamespace(inside=holder)

        def forward(self, x: Tensor) -> Tensor:
            kept = Kept if place == "a class" else holder
            y = self.layer(x - kept.mean.to(x.dtype))
            if torch.is_grad_enabled():
                kept.mean = x.detach().mean(dim=0)
            return y

    return Kept()
