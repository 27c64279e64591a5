"""A trainer that fills up every batch, with whatever loss for the rows that it adds."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.checks import Trainer

# What the loss sends to the rows of padding: nothing that must enter a sum.
HOSTILE = (0.0, 1e4, float("nan"), float("inf"))


class Padded(Trainer):
    """A `Trainer` for batches of any size, which it cuts into parts and fills up.

    Args:
        *args: as for `Trainer`.
        rows: of a physical batch.
        fill: the targets of the rows of padding.
        **options: as for `Trainer`.
    """

    def __init__(self, *args: object, rows: int, fill: float = 0.0, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.rows, self.fill = rows, fill
        self.optimizer._guard.passes.samples.is_padded = True

    def step(self, x: Tensor, target: Tensor) -> None:
        self.optimizer.zero_grad()
        parts = max(1, -(-len(x) // self.rows))
        for index in range(parts):
            at = slice(index * self.rows, (index + 1) * self.rows)
            self.optimizer.signal_skip_step(index + 1 < parts)
            # Not only zero_grad() between logical batches: what it keeps must be kept.
            self.optimizer.zero_grad()
            output = self.model(self._filled(x[at], 0.0))
            self.loss(output, self._filled(target[at], self.fill), self.reduction).backward()
            self.optimizer.step()

    def _filled(self, x: Tensor, value: float) -> Tensor:
        added = x.new_full((self.rows - len(x), *x.shape[1:]), value)
        return torch.cat([x, added])
