"""The step hook that adds to the accountant: Opacus's, in a form that can be copied and saved."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from weakref import ref

from opacus import PrivacyEngine
from opacus.accountants import IAccountant
from opacus.optimizers import DPOptimizer

from opacus_bpclip.errors import PrivacyViolationError

Hook = Callable[[DPOptimizer], None]

# In the names of the functions that `IAccountant.get_optimizer_hook_fn` returns.
_MADE_BY_ACCOUNTANTS = f"{IAccountant.get_optimizer_hook_fn.__name__}.<locals>"


class AccountStep:
    """Adds one entry to the accountant for each step of an optimizer.

    Args:
        accountant: the engine's accountant.
        sample_rate: the probability that an item is in a batch.
        then: called afterwards, with the optimizer.
        engine: whose accountant it must still be at each step; it is not kept alive.
    """

    def __init__(
        self,
        accountant: IAccountant,
        sample_rate: float,
        then: Hook | None = None,
        engine: PrivacyEngine | None = None,
    ) -> None:
        self.accountant = accountant
        self.sample_rate = sample_rate
        self.then = then
        self._engine = None if engine is None else ref(engine)

    def __call__(self, optimizer: DPOptimizer) -> None:
        """Add the step that the optimizer has taken.

        Raises:
            PrivacyViolationError: the engine has got another accountant since.
        """
        engine = self._present_engine
        if engine is not None and engine.accountant is not self.accountant:
            raise PrivacyViolationError(
                "The engine's accountant was replaced after make_private. Steps are counted by the "
                "one before, so the new one's epsilon would leave them out. Choose the accountant "
                'first, as in PrivacyEngine(accountant="rdp"), and go on from saved steps by '
                "engine.load_checkpoint."
            )
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
        """Return whether a function counts steps for the engine: an accountant's own hook does.

        Any other function may read the accountant, and counts nothing.
        """
        if not inspect.isfunction(fn) or _MADE_BY_ACCOUNTANTS not in fn.__qualname__:
            return isinstance(fn, AccountStep)
        engine = self._present_engine
        own = self.accountant if engine is None else engine.accountant
        return any(cell.cell_contents is own for cell in fn.__closure__ or ())

    def __deepcopy__(self, memo: dict[int, Any]) -> AccountStep:
        """Return a hook for the same accountant: an optimizer's copy spends the same budget.

        If the engine is copied with it, they have one accountant, whichever is copied first.
        """
        accountant = memo.setdefault(id(self.accountant), self.accountant)
        engine = memo.get(id(self._present_engine))
        if engine is None and accountant is self.accountant:
            engine = self._present_engine
        return AccountStep(accountant, self.sample_rate, self.then, engine)

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference cannot be saved, and what is loaded belongs to no engine.
        return {**vars(self), "_engine": None}

    @property
    def _present_engine(self) -> PrivacyEngine | None:
        return None if self._engine is None else self._engine()
