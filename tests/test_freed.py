"""A model that nobody holds any more is freed, with its optimizer and its loader."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from opacus.layers import DPGRU
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import BackpropClipping, CrossEntropy, PrivacyEngine


class Last(nn.Module):
    """A recurrent network's last output."""

    def __init__(self) -> None:
        super().__init__()
        self.network = DPGRU(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.unsqueeze(1))[0][:, -1]


class Scaled(nn.Module):
    """A layer without a rule, whose parameter enters functions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 3),
    "norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)),
    "recurrent": Last,
    "function": lambda: nn.Sequential(Scaled(), nn.Linear(4, 3)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "joint": {},
    "layerwise": {"backprop": BackpropClipping(allocation="equal")},
    "clipped inputs": {"backprop": BackpropClipping(max_input_norm=1.0)},
    "criterion": {"criterion": CrossEntropy()},
    "constant shapes": {"physical_batch_size": 4},
}


@pytest.fixture(scope="module", autouse=True)
def _collector_starts_here() -> None:
    """Let the collector leave out what earlier tests keep: it runs three times in each test."""
    gc.collect()
    gc.freeze()


def trained(model: nn.Module, steps: int, backend: str | None, **options: Any) -> list[Any]:
    """Return weak references to all that was made private."""
    data = TensorDataset(torch.randn(16, 4), torch.randint(3, (16,)))
    engine = PrivacyEngine()
    private, optimizer, *criterion, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
        **options,
    )
    forward = torch.compile(private, backend=backend, dynamic=True) if backend else private
    loss = criterion[0] if criterion else nn.CrossEntropyLoss()
    for (x, y), _ in zip(loader, range(steps), strict=False):
        optimizer.zero_grad()
        loss(forward(x), y).backward()
        optimizer.step()
    return [weakref.ref(thing) for thing in (private, model, optimizer, loader, engine)]


def check_freed(references: list[Any]) -> None:
    for _ in range(3):  # what frees others only when it is freed itself takes another round
        gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_what_was_made_private_is_freed(
    model: Callable[[], nn.Module], options: dict[str, Any], steps: int
) -> None:
    check_freed(trained(model(), steps, None, **options))


def test_what_was_compiled_is_freed_with_its_graphs() -> None:
    references = trained(nn.Linear(4, 3), 2, "aot_eager")
    torch._dynamo.reset()
    check_freed(references)
