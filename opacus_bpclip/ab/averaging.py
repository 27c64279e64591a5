"""The average of a model's weights over the last part of training so far."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class WeightAverage:
    """An exponential moving average of the trainable parameters, over optimizer steps.

    It is made of what the steps have released, so it costs no privacy. Early on it forgets faster,
    by ``(1 + n) / (10 + n)`` after ``n`` steps, so that the initial weights do not weigh on it.

    Args:
        model: its parameters are read, and never replaced.
        decay: of the weights before a step; above 0 and below 1. About the last
            ``1 / (1 - decay)`` steps count.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        # A list of its own: a private model cannot be copied with its hooks.
        self._own = nn.ParameterList(p for p in model.parameters() if p.requires_grad)

        def moved(average: Tensor, latest: Tensor, steps: Tensor | int) -> Tensor:
            count = int(steps)
            return torch.lerp(average, latest, 1 - min(decay, (1 + count) / (10 + count)))

        self._average = AveragedModel(self._own, avg_fn=moved)

    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        self._average.update_parameters(self._own)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the average; after the block it has its own weights again."""
        own = [p.detach().clone() for p in self._own]
        self._set(list(self._average.module.parameters()))
        try:
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._own, values, strict=True):
            parameter.copy_(value)
