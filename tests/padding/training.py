"""How the tests train on batches of constant shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_bpclip import BackpropClipping, PrivacyEngine
from tests.helpers import Private, make_private, summed
from tests.padding.models import KINDS, items_of

DELTA = 0.5


def private_of(
    kind: str = "perceptron",
    rows: int | None = 8,
    *,
    clipping: BackpropClipping | None = None,
    **options: Any,
) -> Private:
    """Return private training whose loader draws the same samples each time."""
    torch.manual_seed(1)
    options = {"max_grad_norm": DELTA, "lr": 0.0, "counted": True} | options
    private = make_private(
        KINDS[kind].build(),
        backprop=clipping or BackpropClipping(),
        data=options.pop("data", None) or items_of(kind),
        physical_batch_size=rows,
        **options,
    )
    torch.manual_seed(7)
    return private


def with_criterion(
    kind: str, rows: int | None, reduction: str = "mean", criterion: nn.Module | None = None
) -> tuple[Any, ...]:
    """Return model, optimizer, criterion and loader."""
    torch.manual_seed(1)
    model = KINDS[kind].build()
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        criterion=criterion or nn.CrossEntropyLoss(reduction=reduction),
        data_loader=DataLoader(items_of(kind), batch_size=8),
        noise_multiplier=0.0,
        max_grad_norm=DELTA,
        loss_reduction=reduction,
        clipping="backprop",
        physical_batch_size=rows,
    )
    torch.manual_seed(7)
    return made


def train(
    private: Private,
    batches: Iterable[Any] | None = None,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> list[Tensor]:
    """Take a step for each batch; return the sum of each sample."""
    found = []
    for *x, y in private.loader if batches is None else batches:
        private.optimizer.zero_grad()
        loss(private.model(*x), y).backward()
        private.optimizer.step()
        if not private.optimizer._is_last_step_skipped:
            found.append(summed(private))
    return found


def check_alike(found: list[Tensor], expected: list[Tensor], tolerance: float = 2e-6) -> None:
    """The sums are the same, one for one."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        apart = float((one - other).norm())
        assert apart <= tolerance * DELTA * 10, f"differ by {apart}"
