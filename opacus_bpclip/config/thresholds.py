"""How a threshold moves between steps: by a quantile that is released, or in public."""

from __future__ import annotations

import math
from dataclasses import dataclass

from opacus_bpclip.config.checks import is_positive_number, require_positive

# Far from where single precision ends: factors are quotients of thresholds and norms.
_LEAST, _LARGEST = 1e-12, 1e12

# Natural logarithm of the largest change of a threshold in one step.
_FAR = 100.0


@dataclass(frozen=True)
class AdaptiveThreshold:
    """A threshold that follows a quantile of the examples' gradient norms, privately.

    After each step it is multiplied by ``exp(-clipbound_learning_rate * (b - q))``, where ``b`` is
    the noisy fraction of examples within the threshold and ``q`` the quantile (Andrew et al. 2021,
    arXiv 1905.03871). The counts are released in the same Gaussian mechanism as the gradient, whose
    noise grows so that the step costs what ``noise_multiplier`` says. Each layer that clips by
    itself has its own threshold.

    Args:
        target_unclipped_quantile: the fraction of examples that are to be within the threshold.
        clipbound_learning_rate: how fast the threshold moves.
        initial: the first threshold, in units of the norm of an example's gradient.
        min_clipbound: the smallest threshold.
        max_clipbound: the largest threshold.
        ramp_steps: the number of first steps over which the quantile rises in proportion from 0.
        count_noise: the noise of the ``L`` counts, in units of ``noise_multiplier * sqrt(L)``;
            more than 1/2. The gradient's noise is multiplied by
            ``1 / sqrt(1 - 1 / (4 * count_noise ** 2))``.

    Raises:
        ValueError: a value is out of range; the message names it.

    Examples:
        >>> AdaptiveThreshold().following(0.5, 0.75, 0)
        0.5
        >>> AdaptiveThreshold(ramp_steps=10).following(0.5, 0.75, 0) < 0.5
        True
    """

    target_unclipped_quantile: float = 0.75
    clipbound_learning_rate: float = 0.2
    initial: float = 0.5
    min_clipbound: float = 0.02
    max_clipbound: float = 1e8
    ramp_steps: int = 0
    count_noise: float = 5.0

    def __post_init__(self) -> None:
        names = ("clipbound_learning_rate", "initial", "min_clipbound", "max_clipbound")
        require_positive(self, names)
        if not is_positive_number(self.target_unclipped_quantile) or (
            self.target_unclipped_quantile >= 1
        ):
            raise ValueError(
                f"Expected target_unclipped_quantile={self.target_unclipped_quantile!r} to be a "
                "number between 0 and 1."
            )
        if not is_positive_number(self.count_noise) or not 0.5 < self.count_noise <= _LARGEST:
            raise ValueError(
                f"Expected count_noise={self.count_noise!r} to be > 0.5 and at most {_LARGEST}: "
                "with less noise the counts alone would cost more than the whole step may."
            )
        if type(self.ramp_steps) is not int or self.ramp_steps < 0:
            raise ValueError(f"Expected ramp_steps={self.ramp_steps!r} to be an integer >= 0.")
        if not self.min_clipbound <= self.initial <= self.max_clipbound:
            raise ValueError(
                f"Expected initial={self.initial!r} to be between min_clipbound="
                f"{self.min_clipbound!r} and max_clipbound={self.max_clipbound!r}."
            )
        _require_in_range(self, ("min_clipbound", "max_clipbound"))

    @property
    def ends(self) -> tuple[float, float]:
        """Return the smallest and the largest threshold."""
        return self.min_clipbound, self.max_clipbound

    def following(self, threshold: float, within: float, step: int) -> float:
        """Return the threshold after a step.

        Args:
            threshold: the step's threshold.
            within: the released fraction of examples within it.
            step: the step's number, from 0.
        """
        quantile = self.target_unclipped_quantile
        if step < self.ramp_steps:
            quantile *= step / self.ramp_steps
        exponent = -self.clipbound_learning_rate * (within - quantile)
        # Much noise in small batches may ask for more than a number can hold.
        moved = threshold * math.exp(min(max(exponent, -_FAR), _FAR))
        return min(max(moved, self.min_clipbound), self.max_clipbound)


@dataclass(frozen=True)
class ThresholdSchedule:
    """A threshold that moves from one value to another in public, so that it costs nothing.

    Args:
        initial: the first threshold, in units of the norm of an example's gradient.
        final: the threshold after ``steps`` steps, and from then on. In between it moves by a
            constant factor.
        steps: the number of steps.

    Raises:
        ValueError: a value is not above zero; the message names it.

    Examples:
        >>> [ThresholdSchedule(0.4, 0.1, 2).at(step) for step in (0, 1, 2, 3)]
        [0.4, 0.2, 0.1, 0.1]
    """

    initial: float
    final: float
    steps: int

    def __post_init__(self) -> None:
        require_positive(self, ("initial", "final"))
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"Expected steps={self.steps!r} to be an integer >= 1.")
        _require_in_range(self, ("initial", "final"))

    @property
    def ends(self) -> tuple[float, float]:
        """Return the smallest and the largest threshold that a layer may have."""
        return _LEAST, _LARGEST

    def at(self, step: int) -> float:
        """Return the threshold of a step, counted from 0."""
        part = min(step / self.steps, 1.0)
        return float(self.initial ** (1 - part) * self.final**part)


def _require_in_range(options: object, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(options, name)
        if not _LEAST <= value <= _LARGEST:
            raise ValueError(f"Expected {name}={value!r} to be from {_LEAST} to {_LARGEST}.")
