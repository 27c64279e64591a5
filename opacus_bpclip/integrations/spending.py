"""The privacy that a training run has spent: kept beside each checkpoint, and held to a target.

A run may branch: it may be resumed from a checkpoint although later ones exist. All of them were
made from the data, so the steps of all of them count. Runs are told apart by an identifier.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opacus.accountants import IAccountant, create_accountant

FILE = "privacy.json"

UNKNOWN_STEPS = (
    "so the steps that were taken before it are unknown and would be missing from epsilon. Resume "
    "from a checkpoint that a PrivateTrainer has saved. A model that was trained without privacy, "
    "or on other data, is a start for a new run: "
)

# Steps of one kind: the noise multiplier, the sampling rate and the number of steps.
Steps = tuple[float, float, int]


class Spending:
    """The privacy that a run has spent on its data.

    Args:
        accountant: the engine's accountant.
        delta: the delta of every epsilon.
        target: the largest epsilon to spend; ``None`` for no limit.
    """

    def __init__(self, accountant: IAccountant, delta: float, target: float | None) -> None:
        self.accountant = accountant
        self.delta = delta
        self.target = target
        self.run = uuid.uuid4().hex
        self._end: tuple[float, float, int] | None = None

    @property
    def epsilon(self) -> float:
        """Return the epsilon that is spent."""
        return self._epsilon_of(self.accountant.history)

    @property
    def steps(self) -> int:
        """Return the number of steps that were taken."""
        return sum(steps for _, _, steps in self.accountant.history)

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

    def forget_end(self) -> None:
        """Find anew how many steps are left: more than was planned before may follow."""
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
        """Return what was spent, as plain values for a checkpoint."""
        return {
            "run": self.run,
            "mechanism": self.accountant.mechanism(),
            "history": list(self.accountant.history),
            "delta": self.delta,
            "epsilon": self.epsilon,
        }

    def save(self, path: Path) -> None:
        """Write what was spent into a file, whose folder is made if there is none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.state(), indent=2))
        unfinished.replace(path)  # A reader never sees half of it.

    def restore(self, checkpoint: str | os.PathLike[str]) -> None:
        """Take over the steps of a checkpoint's run, those of its later checkpoints included.

        Args:
            checkpoint: the folder of the checkpoint, with a `FILE`. Folders beside it, and the one
                around it, may hold later checkpoints.

        Raises:
            ValueError: it does not say what was spent, or another accountant counted it.
        """
        path = Path(checkpoint) / FILE
        if not path.exists():
            raise ValueError(
                f"The checkpoint {checkpoint} has no {FILE}, {UNKNOWN_STEPS}load it with "
                "from_pretrained, and train without resume_from_checkpoint."
            )
        around = path.parent.parent
        beside = [*around.glob(f"*/{FILE}"), *around.glob(FILE)]
        self.take_over(json.loads(path.read_text()), beside)

    def take_over(self, saved: Mapping[str, Any], beside: Iterable[Path]) -> None:
        """Take over the steps of a run, those of its other branches included.

        Steps that this object has counted in another run are kept, too.

        Args:
            saved: the `state` that was saved.
            beside: files that may hold what later or other branches of the run have spent.

        Raises:
            ValueError: another accountant counted it.
        """
        others = (json.loads(path.read_text()) for path in beside)
        branches = [saved, *(other for other in others if other["run"] == saved["run"])]
        self._require_same_mechanism(saved)
        history = max((_history(each) for each in branches), key=_count)
        own: list[Steps] = self.accountant.history
        if self.run != saved["run"]:
            history = history + own
        elif _count(own) > _count(history):
            history = own
        self.run, self.accountant.history = saved["run"], history
        self.forget_end()

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

    def _epsilon_of(self, history: Sequence[Steps]) -> float:
        if not history:
            return 0.0
        if any(noise_multiplier == 0 for noise_multiplier, _, _ in history):
            return math.inf
        counted = create_accountant(self.accountant.mechanism())
        counted.history = list(history)
        return float(counted.get_epsilon(self.delta))


def _count(history: Sequence[Steps]) -> int:
    return sum(steps for _, _, steps in history)


def _history(saved: Mapping[str, Any]) -> list[Steps]:
    return [(float(s), float(q), int(n)) for s, q, n in saved["history"]]
