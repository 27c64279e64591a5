"""The Gaussian mechanism in a few lines, and ways to get it wrong; a step takes microseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from opacus_bpclip.audit import Batch, Target, Trainer

ENTRIES = 30


class Gaussian(Trainer):
    """Rows clipped to norm 1, summed, with noise; in two blocks, as a model of two layers."""

    def __init__(self, noise_multiplier: float) -> None:
        blocks = [nn.Parameter(torch.zeros(ENTRIES // 2)) for _ in range(2)]
        super().__init__(blocks, noise_multiplier=noise_multiplier, sensitivity=1.0)
        self.rows = torch.zeros(0, ENTRIES)
        self.steps = 0

    def compute(self, batch: Batch) -> None:
        (self.rows,) = batch

    def clipped(self) -> torch.Tensor:
        return self.rows / self.rows.norm(dim=1, keepdim=True).clamp(min=1)

    def noise(self) -> torch.Tensor:
        return torch.randn(ENTRIES) * self.noise_multiplier

    def step(self) -> None:
        self.steps += 1
        noisy = self.clipped().sum(0) + self.noise()
        for p, block in zip(self.parameters, noisy.chunk(2), strict=True):
            p.grad = block

    def history(self) -> list[tuple[float, float, int]]:
        return [(self.noise_multiplier, 1.0, self.steps)]


def clipped(change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """A change of the clipped rows."""
    return {"clipped": lambda self: change(Gaussian.clipped(self))}


def noise(change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """A change of the noise."""
    return {"noise": lambda self: change(Gaussian.noise(self))}


def target(*, attained: bool = True, **methods: Any) -> Target:
    """The mechanism, with some of its methods replaced, as something to audit."""
    generator = torch.Generator().manual_seed(0)
    spike = torch.zeros(1, ENTRIES)
    spike[0, 3] = 1e4
    return Target(
        name="Gaussian",
        make=type("Changed", (Gaussian,), methods),
        batches=((torch.randn(2, ENTRIES, generator=generator),),),
        canaries=((spike,),),
        attained=attained,
    )
