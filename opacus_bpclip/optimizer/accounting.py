"""The step hook that adds to the accountant: Opacus's, in a form that can be copied and saved."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from opacus.accountants import IAccountant
from opacus.optimizers import DPOptimizer

Hook = Callable[[DPOptimizer], None]

# In the names of the functions that `IAccountant.get_optimizer_hook_fn` returns.
_MADE_BY_ACCOUNTANTS = f"{IAccountant.get_optimizer_hook_fn.__name__}.<locals>"


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
        counted = list(self.accountant.history)
        try:
            self.accountant.step(
                noise_multiplier=optimizer.noise_multiplier,
                sample_rate=self.sample_rate * optimizer.accumulated_iterations,
            )
        except BaseException:
            # Opacus's accountant of one kind of steps forgets all of them when it meets another.
            self.accountant.history = counted
            raise
        if self.then is not None:
            self.then(optimizer)

    def is_replaced_by(self, fn: Hook) -> bool:
        """Return whether a function counts steps for the same accountant: Opacus's own hook does.

        Any other function may read the accountant, and counts nothing.
        """
        if not inspect.isfunction(fn) or _MADE_BY_ACCOUNTANTS not in fn.__qualname__:
            return isinstance(fn, AccountStep)
        return any(cell.cell_contents is self.accountant for cell in fn.__closure__ or ())

    def __deepcopy__(self, memo: dict[int, Any]) -> AccountStep:
        """Return a hook for the same accountant: an optimizer's copy spends the same budget.

        If the engine is copied with it, they have one accountant, whichever is copied first.
        """
        accountant = memo.setdefault(id(self.accountant), self.accountant)
        return AccountStep(accountant, self.sample_rate, self.then)
