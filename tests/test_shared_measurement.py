"""Layers that get the same input measure it once, and never reuse an outdated measurement."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from opacus_bpclip.rules import LinearRule
from tests.budgets import layerwise
from tests.checks import HUGE
from tests.helpers import make_private, summed
from tests.mutants import bound_killers

WIDTH = 4


class Branches(nn.Module):
    """As many layers on one input as an attention has: query, key and value."""

    def __init__(self, bias: tuple[bool, ...] = (True, True, True)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 2, bias=own) for own in bias)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for layer in self.layers:
            total = total + layer(x)
            x = self.between(x)
        return total


class InPlace(Branches):
    def between(self, x: Tensor) -> Tensor:
        return x.mul_(HUGE)


class Copies(Branches):
    def between(self, x: Tensor) -> Tensor:
        return x.clone()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was measured so far."""
    seen: list[Tensor] = []
    measure = LinearRule.measure

    def noting(self: LinearRule, x: Tensor) -> object:
        seen.append(x)
        return measure(self, x)

    monkeypatch.setattr(LinearRule, "measure", noting)
    return seen


def run(model: nn.Module, x: Tensor) -> float:
    """Return how much the batch contributes."""
    data = TensorDataset(torch.zeros(32, *x.shape[1:]))
    private = make_private(model, data=data, backprop=layerwise(probe=False))
    private.model(x).sum().backward()
    private.optimizer.step()
    return float(summed(private).norm())


@pytest.mark.parametrize(
    ("model", "times"),
    [
        pytest.param(Branches(), 1, id="the same tensor"),
        pytest.param(Branches((True, False, False)), 2, id="other parameters"),
        pytest.param(Copies(), 3, id="equal tensors"),
    ],
)
def test_one_input_is_measured_once(model: nn.Module, times: int, measured: list[Tensor]) -> None:
    run(model, torch.ones(1, WIDTH))
    assert len(measured) == times


def test_an_input_that_changes_between_two_layers_is_refused_or_measured_anew(
    measured: list[Tensor],
) -> None:
    # Autograd itself refuses: the first layer's input is not what it was.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(InPlace(), torch.ones(1, WIDTH))
    assert len(measured) == 3


def test_a_buffer_that_is_filled_with_another_batch_is_measured_anew() -> None:
    bound_killers.buffer_filled_anew()
