"""How the tests train with what ``make_private(criterion=...)`` returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import (
    PrivacyEngine,
)
from tests.helpers import CLASSES, FEATURES, dataset, flat, mlp
from tests.test_compile import fresh_compiler  # noqa: F401

LENGTH = 3


NOT_THROUGH = (
    "got a gradient that did not come through the criterion that make_private returned. If it is "
    "that of a mean, its division by the private batch size would not be undone. Compute the "
    "loss with the returned criterion, or leave criterion out of make_private."
)


class Training(NamedTuple):
    model: nn.Module
    optimizer: Any
    criterion: Any
    loader: DataLoader

    def step(self, loss: Callable[[], Tensor]) -> Tensor:
        self.optimizer.zero_grad()
        loss().backward()
        self.optimizer.step()
        return flat(p.summed_grad for p in self.optimizer.params)

    def sum_over(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return self.step(lambda: scale * self.criterion(self.model(x), y))


def training(
    criterion: Any,
    model: nn.Module | None = None,
    *,
    engine: Any = None,
    wrap_model: bool = True,
    data: TensorDataset | None = None,
    **options: Any,
) -> Training:
    model = model or mlp()
    made = (engine or PrivacyEngine()).make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        data_loader=DataLoader(data or dataset(), batch_size=8),
        **{"noise_multiplier": 0.0, "max_grad_norm": 1.0, "clipping": "backprop"} | options,
        wrap_model=wrap_model,
        **({} if criterion is None else {"criterion": criterion}),
    )
    handle, optimizer, *private, loader = made
    optimizer.keep_summed_grad = True
    optimizer._guard.passes.samples.attached = False  # the batches are made up
    (criterion,) = private or (nn.CrossEntropyLoss(),)
    return Training(handle if wrap_model else model, optimizer, criterion, loader)


class Sequences(nn.Module):
    """Logits of sequences, ``[B, C, T]``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).transpose(1, 2)


def sequences(size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(size, LENGTH, FEATURES, generator=generator)
    return x, torch.randint(CLASSES, (size, LENGTH), generator=generator)


def on_sequences(criterion: Any, **options: Any) -> Training:
    data = TensorDataset(*sequences(32))
    return training(criterion, Sequences(), data=data, **options)
