"""The empirical epsilon: how well an attacker who knows everything else tells two worlds apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from opacus_bpclip.audit.noise_law import Array
from opacus_bpclip.audit.statistics import (
    epsilon_lower_bound,
    gaussian_epsilon,
    mu_lower_bound,
    rate_upper_bound,
)

# From this many trials a bound below 0.8 of the true mu means that the audit is asleep.
ENOUGH_TRIALS = 10_000
_AWAKE = 0.8
_BINS = 60


@dataclass(frozen=True)
class Histogram:
    """How often each range of scores occurred in the worlds without and with the canary."""

    low: float
    high: float
    without: tuple[int, ...]
    with_canary: tuple[int, ...]


@dataclass(frozen=True)
class Empirical:
    """What the attacker achieved.

    Attributes:
        steps: training steps in a trial.
        trials: trials in each world.
        mu: claimed; ``sqrt(steps) / noise_multiplier``.
        gap: distance of the worlds' scores that the measured change predicts.
        threshold: fixed before the trials: half the gap.
        false_positives: trials without the canary that were taken for trials with it.
        false_negatives: the other mistakes.
        alpha: chance of each rate's bound to be wrong.
        mu_lower: lower bound on the mechanism's mu.
        delta: at which epsilon is taken.
        epsilon: claimed; of the Gaussian mechanism with that mu.
        epsilon_lower: lower bound on epsilon that assumes nothing about the noise.
        control: ``mu_lower`` of a world against itself; zero unless the audit is broken.
        expected: whether the canary is known to reach the sensitivity.
        histogram: of the scores.
    """

    steps: int
    trials: int
    mu: float
    gap: float
    threshold: float
    false_positives: int
    false_negatives: int
    alpha: float
    mu_lower: float
    delta: float
    epsilon: float
    epsilon_lower: float
    control: float
    expected: bool
    histogram: Histogram

    @property
    def tightness(self) -> float:
        """Return how much of the claimed mu was seen."""
        return self.mu_lower / self.mu

    @property
    def violations(self) -> tuple[str, ...]:
        """Say what breaks the claim."""
        found = []
        kind = "one step" if self.steps == 1 else f"{self.steps} steps"
        if self.mu_lower > self.mu:
            found.append(f"{kind}: mu is at least {self.mu_lower:.3f}, claimed {self.mu:.3f}")
        if self.epsilon_lower > self.epsilon:
            found.append(
                f"{kind}: epsilon is at least {self.epsilon_lower:.3f}, claimed "
                f"{self.epsilon:.3f} at delta {self.delta:g}"
            )
        return tuple(found)

    @property
    def doubts(self) -> tuple[str, ...]:
        """Say why a pass would mean little."""
        found = []
        if self.control > 0:
            found.append(f"a world differs from itself: mu at least {self.control:.3f}")
        if self.expected and self.trials >= ENOUGH_TRIALS and self.tightness < _AWAKE:
            found.append(f"only {self.tightness:.0%} of the claimed mu was seen")
        return tuple(found)


def estimate(
    without: Array,
    with_canary: Array,
    *,
    steps: int,
    noise_multiplier: float,
    gap: float,
    alpha: float,
    delta: float,
    expected: bool,
) -> Empirical:
    """Count the mistakes at a threshold fixed beforehand, and bound what they allow.

    Args:
        without: scores of the trials without the canary, in claimed standard deviations.
        with_canary: scores of as many trials with it.
        steps: training steps in a trial.
        noise_multiplier: claimed.
        gap: predicted distance of the two.
        alpha: chance of each of the two rates' bounds to be wrong.
        delta: at which epsilon is taken.
        expected: whether the canary is known to reach the sensitivity.
    """
    trials = len(without)
    mu = math.sqrt(steps) / noise_multiplier
    threshold = gap / 2
    positives = int(np.count_nonzero(without > threshold))
    # Not `<=`: a score that is not a number is a mistake.
    negatives = int(np.count_nonzero(~(with_canary > threshold)))
    rates = (
        rate_upper_bound(positives, trials, alpha),
        rate_upper_bound(negatives, trials, alpha),
    )
    half = trials // 2
    own = [int(np.count_nonzero(part > threshold)) for part in (without[:half], without[half:])]
    control = [
        rate_upper_bound(own[0], half, alpha),
        rate_upper_bound(trials - half - own[1], trials - half, alpha),
    ]
    return Empirical(
        steps=steps,
        trials=trials,
        mu=mu,
        gap=gap,
        threshold=threshold,
        false_positives=positives,
        false_negatives=negatives,
        alpha=alpha,
        mu_lower=mu_lower_bound(*rates),
        delta=delta,
        epsilon=gaussian_epsilon(mu, delta),
        epsilon_lower=epsilon_lower_bound(*rates, delta),
        control=mu_lower_bound(*control),
        expected=expected,
        histogram=_histogram(without, with_canary),
    )


def _histogram(without: Array, with_canary: Array) -> Histogram:
    scores = np.concatenate([without, with_canary])
    scores = scores[np.isfinite(scores)]
    low, high = (float(scores.min()), float(scores.max())) if len(scores) else (0.0, 1.0)
    counts = [
        tuple(map(int, np.histogram(world, bins=_BINS, range=(low, high))[0]))
        for world in (without, with_canary)
    ]
    return Histogram(low, high, counts[0], counts[1])
