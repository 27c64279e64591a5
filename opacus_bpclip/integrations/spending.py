"""The privacy that a training run has spent: added up over its branches, and held to a target.

A run may branch: it may be resumed from a checkpoint although later ones exist. All of them were
made from the data, so the steps of all of them count. Runs are told apart by an identifier.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from opacus.accountants import IAccountant, create_accountant

from opacus_bpclip.engine.account import Account
from opacus_bpclip.engine.segments import Steps, count, union
from opacus_bpclip.integrations.arguments import PrivacyArguments

# With more than so many times the noise of the latest steps, what is left is not spread out.
_MORE_NOISE = 2.0
# With less, epsilon takes long to compute.
_LESS_NOISE = 1 / 4


class Spending:
    """The privacy that a run has spent on its data.

    Args:
        accountant: the engine's accountant.
        delta: the delta of every epsilon.
        target: the largest epsilon to spend; ``None`` for no limit.

    Attributes:
        run: the identifier of the run.
    """

    def __init__(self, accountant: IAccountant, delta: float, target: float | None) -> None:
        self.accountant = accountant
        self.delta = delta
        self.target = target
        self.run = uuid.uuid4().hex
        self._account = Account(accountant)
        self._end: tuple[float, float, int] | None = None

    @property
    def segment(self) -> str:
        """Return the identifier of the steps that are being taken."""
        return self._account.segment

    @property
    def epsilon(self) -> float:
        """Return the epsilon that is spent."""
        return self._epsilon_of(self.accountant.history)

    @property
    def steps(self) -> int:
        """Return the number of steps that were taken."""
        return sum(steps for _, _, steps in self.accountant.history)

    def noise_for(self, privacy: PrivacyArguments, sample_rate: float, steps: int) -> float:
        """Return the noise multiplier: the given one, or that with which steps fit what is left.

        It is that of the latest steps if it fits and a slightly smaller one does not, and also if
        more than twice as much would be needed: the run then ends where its epsilon ends.

        Args:
            privacy: the privacy of the run.
            sample_rate: of the next steps.
            steps: the number of steps that are still planned.
        """
        taken = self.accountant.history
        if privacy.noise_multiplier is not None or not taken:
            return privacy.noise_for(sample_rate, steps)
        latest = float(taken[-1][0])

        def fits(noise: float) -> bool:
            assert self.target is not None
            return self._epsilon_of([*taken, (noise, sample_rate, steps)]) <= self.target

        if steps <= 0 or (fits(latest) and not fits(0.98 * latest)):
            return latest
        low, high = latest, latest * _MORE_NOISE
        if not fits(high):
            return latest
        while fits(low):
            if low < _LESS_NOISE * latest:
                return low
            low, high = low / 2, low
        while high - low > 1e-3 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high

    def is_spent(self, noise_multiplier: float, sample_rate: float, planned: int) -> bool:
        """Return whether one more step would spend more than the target.

        Args:
            noise_multiplier: of the next steps.
            sample_rate: of the next steps.
            planned: at least the number of steps that may still be taken.
        """
        if self.target is None:
            return False
        kind = noise_multiplier, sample_rate
        if self._end is None or self._end[:2] != kind:
            self._end = (*kind, self.steps + self._within(*kind, planned))
        return self.steps >= self._end[2]

    def begin(self) -> None:
        """Begin a segment. How many steps are left is found anew: other ones are planned."""
        self._account.begin()
        self._end = None

    def require_left(self, noise_multiplier: float, sample_rate: float, planned: int) -> None:
        """Raise if one more step would spend more than the target.

        Args:
            noise_multiplier: of the next steps.
            sample_rate: of the next steps.
            planned: at least the number of steps that may still be taken.

        Raises:
            ValueError: no step is left.
        """
        if self.is_spent(noise_multiplier, sample_rate, planned):
            raise ValueError(
                f"The run has spent an epsilon of {self.epsilon:.4g}, and one more step would "
                f"exceed target_epsilon={self.target}. Pass a larger target_epsilon, or a larger "
                "noise_multiplier, with which more steps fit."
            )

    def state(self) -> dict[str, Any]:
        """Return what was spent, as plain values for a checkpoint or a file.

        An accountant can load it.
        """
        return {
            "run": self.run,
            "mechanism": self.accountant.mechanism(),
            "history": list(self.accountant.history),
            "segments": self._account.state(),
            "delta": self.delta,
            "epsilon": self.epsilon,
        }

    def take_over(self, saved: Mapping[str, Any], branches: Iterable[Mapping[str, Any]]) -> None:
        """Take over the steps of a run, those of its other branches included.

        Steps that this object has counted in another run are kept, too.

        Args:
            saved: the `state` that was saved.
            branches: states of the run that later or other branches have saved.

        Raises:
            ValueError: another accountant counted it.
        """
        self._require_same_mechanism(saved)
        reports = [
            {name: count(steps) for name, steps in state["segments"].items()}
            for state in (saved, *branches)
        ]
        self.run = saved["run"]
        self._account.adopt(union([self._account.segments(), *reports]))
        self._end = None

    def agree(self, first: Callable[[Any], Any]) -> None:
        """Count what the first process counts: identifiers are random, and files change.

        Processes that disagree would not stop at the same step.

        Args:
            first: returns, on each process, the first one's argument.
        """
        account = self._account
        self.run, account.segment, segments = first((self.run, account.segment, account.segments()))
        account.adopt(segments)
        self._end = None

    def _require_same_mechanism(self, saved: Mapping[str, Any]) -> None:
        mechanism = self.accountant.mechanism()
        if saved["mechanism"] != mechanism:
            raise ValueError(
                f"The checkpoint's steps were counted by the accountant {saved['mechanism']!r}, "
                f"and this run's is {mechanism!r}. Pass PrivacyArguments(accountant="
                f"{saved['mechanism']!r})."
            )

    def _within(self, noise_multiplier: float, sample_rate: float, planned: int) -> int:
        """Return how many of the planned steps fit the target."""
        assert self.target is not None
        low, high = 0, planned + 1  # `low` steps fit, `high` do not, or are not planned
        middle = planned
        while high - low > 1:
            more = [*self.accountant.history, (noise_multiplier, sample_rate, middle)]
            if self._epsilon_of(more) <= self.target:
                low = middle
            else:
                high = middle
            middle = (low + high) // 2
        return low

    def _epsilon_of(self, steps: Sequence[Steps]) -> float:
        if not steps:
            return 0.0
        if any(noise_multiplier == 0 for noise_multiplier, _, _ in steps):
            return math.inf
        counted = create_accountant(self.accountant.mechanism())
        counted.history = list(steps)
        return float(counted.get_epsilon(self.delta))
