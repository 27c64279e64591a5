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

_REMEDY = (
    'Choose the accountant before make_private, as in PrivacyEngine(accountant="rdp"), and go on '
    "from saved steps by engine.load_checkpoint."
)


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
        self._running = False

    @classmethod
    def of(cls, fn: Hook) -> AccountStep | None:
        """Return a step hook that counts as ``fn`` does; ``None`` if ``fn`` is no accountant's."""
        if isinstance(fn, AccountStep):
            return fn
        if not inspect.isfunction(fn) or _MADE_BY_ACCOUNTANTS not in fn.__qualname__:
            return None
        held = inspect.getclosurevars(fn).nonlocals
        accountants = [own for own in held.values() if isinstance(own, IAccountant)]
        if len(accountants) != 1 or "sample_rate" not in held:
            return None
        return cls(accountants[0], held["sample_rate"])

    def __call__(self, optimizer: DPOptimizer) -> None:
        """Add the step that the optimizer has taken.

        Raises:
            PrivacyViolationError: the engine has got another accountant since.
        """
        if self._running:
            return  # A hook that replaces an earlier one may call it.
        self._running = True
        try:
            self._count(optimizer)
            if self.then is not None:
                self.then(optimizer)
        finally:
            self._running = False

    def _count(self, optimizer: DPOptimizer) -> None:
        engine = self._present_engine
        if engine is not None and engine.accountant is not self.accountant:
            raise PrivacyViolationError(
                "The engine's accountant was replaced after make_private. Steps are counted by the "
                f"one before, so the new one's epsilon would leave them out. {_REMEDY}"
            )
        counted = list(self.accountant.history)
        try:
            self.accountant.get_optimizer_hook_fn(self.sample_rate)(optimizer)
        except BaseException:
            # Opacus's accountant of one kind of steps forgets all of them when it meets another.
            self.accountant.history = counted
            raise

    def with_hook(self, fn: Hook) -> AccountStep:
        """Return the hook that counts for the same engine, and calls ``fn``.

        If ``fn`` counts steps for the engine's accountant itself, it takes the place of this one.

        Raises:
            PrivacyViolationError: it counts for an accountant that has replaced the one of this
                hook, which has counted steps already.
        """
        other, engine = AccountStep.of(fn), self._present_engine
        present = self.accountant if engine is None else engine.accountant
        if other is None or other.accountant not in (self.accountant, present):
            self.then = fn
            return self
        if other.accountant is not self.accountant and self.accountant.history:
            raise PrivacyViolationError(
                "The engine's accountant was replaced after steps that the one before has counted. "
                f"The new one's epsilon would leave them out. {_REMEDY}"
            )
        owner = other._present_engine or engine
        return AccountStep(other.accountant, other.sample_rate, other.then or self.then, owner)

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
