"""Killers of mutants of a step's release: its noise, its accounting and its divisor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping
from opacus_bpclip import audit as audits
from opacus_bpclip.optimizer import noise
from tests.budgets import layerwise
from tests.checks import (
    Trainer,
    check_noise_is_fresh,
    check_noise_scale,
    check_one_entry_per_logical_batch,
    check_one_entry_per_step,
    check_public_divisor,
)


class Noisy(nn.Module):
    """Two layers that are used, and one that is not: it gets noise all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.unused = nn.Linear(20, 30), nn.Linear(30, 10), nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def _noisy(count: int = 4) -> tuple[Trainer, Tensor, Tensor]:
    torch.manual_seed(0)
    trainer = Trainer(
        Noisy(),
        (20,),
        layerwise(),
        noise_multiplier=1.3,
        max_grad_norm=0.7,
        noise_generator=torch.Generator().manual_seed(0),
    )
    return trainer, torch.randn(count, 20).double(), torch.randn(count, 10).double()


def noise_scale() -> None:
    """Noise of a model with three layers, one of them unused."""
    check_noise_scale(*_noisy(), steps=20)


def noise_of_an_empty_batch() -> None:
    """Noise of a step whose Poisson batch is empty."""
    check_noise_scale(*_noisy(0), steps=20)


def fresh_noise() -> None:
    """Noise of a model with three layers, over several steps."""
    check_noise_is_fresh(*_noisy(), steps=5)


def fresh_noise_of_streams() -> None:
    """Noise of the same model, over two steps, in draws so small that it takes many streams."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "_DRAW", 16)
        patch.setattr(noise, "_DRAWS", 2)
        check_noise_is_fresh(*_noisy(), steps=2)


def _audit(case: str, clipping: BackpropClipping | None = None) -> None:
    target = audits.CASES[case].target(case, clipping=clipping)
    verdict = audits.audit(target, trials=100, searches=0)
    assert verdict.outcome == "pass", f"the audit says: {'; '.join(verdict.violations)}"


def audit() -> None:
    """The statistical audit of a linear layer, 100 trials in each world."""
    _audit("linear")


def audit_of_branches() -> None:
    """The statistical audit of four layers side by side, each with a budget of its own, 100 trials
    in each world."""
    _audit("branches", layerwise())


def accounting() -> None:
    """Three steps of a model with three layers."""
    check_one_entry_per_step(*_noisy(), steps=3)


def accounting_of_empty_batches() -> None:
    """Three steps whose Poisson batches are empty."""
    check_one_entry_per_step(*_noisy(0), steps=3)


def accounting_of_physical_batches() -> None:
    """Logical batches computed in parts by Opacus's BatchMemoryManager."""
    torch.manual_seed(0)
    check_one_entry_per_logical_batch(_noisy()[0], epochs=2)


def divisor() -> None:
    """Batches of any size, without noise."""
    trainer = Trainer(nn.Linear(4, 3), (4,), layerwise())
    check_public_divisor(trainer, torch.ones(6, 4).double(), torch.ones(6, 3).double())
