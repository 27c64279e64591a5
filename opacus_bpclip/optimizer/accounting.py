"""What tells the accountant of a step: Opacus's hook, in a form that can be copied and saved."""

from __future__ import annotations

from typing import Any

from opacus.accountants import IAccountant
from opacus.optimizers import DPOptimizer


class AccountStep:
    """Adds one entry to the accountant for each step of an optimizer.

    Args:
        accountant: the engine's.
        sample_rate: with which each item is in a batch.
    """

    def __init__(self, accountant: IAccountant, sample_rate: float) -> None:
        self.accountant = accountant
        self.sample_rate = sample_rate

    def __call__(self, optimizer: DPOptimizer) -> None:
        """Account for one step."""
        self.accountant.step(
            noise_multiplier=optimizer.noise_multiplier,
            sample_rate=self.sample_rate * optimizer.accumulated_iterations,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> AccountStep:
        """Return one for the same accountant: what a copy of the optimizer spends is spent, too."""
        return AccountStep(self.accountant, self.sample_rate)
