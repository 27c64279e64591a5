"""The step hook that adds to the accountant: Opacus's, in a form that can be copied and saved."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from opacus.accountants import IAccountant
from opacus.optimizers import DPOptimizer

Hook = Callable[[DPOptimizer], None]


class AccountStep:
    """Adds one entry to the accountant for each step of an optimizer.

    Args:
        accountant: the engine's accountant.
        sample_rate: the probability that an item is in a batch.
        then: called afterwards, with the optimizer.
    """

    def __init__(
        self, accountant: IAccountant, sample_rate: float, then: Hook | None = None
    ) -> None:
        self.accountant = accountant
        self.sample_rate = sample_rate
        self.then = then

    def __call__(self, optimizer: DPOptimizer) -> None:
        """Add the step that the optimizer has taken."""
        self.accountant.step(
            noise_multiplier=optimizer.noise_multiplier,
            sample_rate=self.sample_rate * optimizer.accumulated_iterations,
        )
        if self.then is not None:
            self.then(optimizer)

    def is_replaced_by(self, fn: Hook) -> bool:
        """Return whether a function counts steps for the same accountant, as Opacus's hooks do."""
        closure = inspect.getclosurevars(fn).nonlocals if inspect.isfunction(fn) else {}
        own = any(value is self.accountant for value in closure.values())
        return own or isinstance(fn, AccountStep)

    def __deepcopy__(self, memo: dict[int, Any]) -> AccountStep:
        """Return a hook for the same accountant: an optimizer's copy spends the same budget."""
        return AccountStep(self.accountant, self.sample_rate, self.then)
