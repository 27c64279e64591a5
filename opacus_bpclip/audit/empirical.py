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
from opacus_bpclip.audit.trials import Trials

# From this many trials a bound below 0.8 of the true mu means that the audit is too weak.
ENOUGH_TRIALS = 10_000
_ENOUGH_SEEN = 0.8
_BINS = 60


@dataclass(frozen=True)
class Histogram:
    """How often scores between two edges occurred in the worlds without and with the canary."""

    edges: tuple[float, ...]
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
        false_positives: trials without the canary that were taken for trials with it.
        false_negatives: the other mistakes.
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
    false_positives: int
    false_negatives: int
    mu_lower: float
    delta: float
    epsilon: float
    epsilon_lower: float
    control: float
    expected: bool
    histogram: Histogram

    @property
    def threshold(self) -> float:
        """The score above which a trial is taken for one with the canary."""
        return self.gap / 2

    @property
    def tightness(self) -> float:
        """How much of the claimed mu was seen."""
        return self.mu_lower / self.mu

    @property
    def violations(self) -> tuple[str, ...]:
        """What breaks the claim."""
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
        """Why a pass would mean little."""
        found = []
        if self.control > 0:
            found.append(f"a world differs from itself: mu at least {self.control:.3f}")
        if self.expected and self.trials >= ENOUGH_TRIALS and self.tightness < _ENOUGH_SEEN:
            found.append(f"only {self.tightness:.0%} of the claimed mu was seen")
        return tuple(found)


def estimate(done: Trials, *, alpha: float, delta: float, expected: bool) -> Empirical:
    """Count the mistakes at a threshold fixed beforehand, and bound what they allow.

    Args:
        done: the trials; their noise is not looked at.
        alpha: chance of each of the two rates' bounds to be wrong.
        delta: at which epsilon is taken.
        expected: whether the canary is known to reach the sensitivity.
    """
    threshold, trials = done.gap / 2, len(done.without)
    mistakes = _mistakes(done.without, done.with_canary, threshold)
    false_positives, false_negatives = (rate_upper_bound(n, trials, alpha) for n in mistakes)
    halves = done.without[: trials // 2], done.without[trials // 2 :]
    own = zip(_mistakes(*halves, threshold), halves, strict=True)
    control = mu_lower_bound(*(rate_upper_bound(n, len(half), alpha) for n, half in own))
    mu = math.sqrt(done.steps) / done.noise_multiplier
    return Empirical(
        steps=done.steps,
        trials=trials,
        mu=mu,
        gap=done.gap,
        false_positives=mistakes[0],
        false_negatives=mistakes[1],
        mu_lower=mu_lower_bound(false_positives, false_negatives),
        delta=delta,
        epsilon=gaussian_epsilon(mu, delta),
        epsilon_lower=epsilon_lower_bound(false_positives, false_negatives, delta),
        control=control,
        expected=expected,
        histogram=_histogram(done.without, done.with_canary),
    )


def _mistakes(without: Array, with_canary: Array, threshold: float) -> tuple[int, int]:
    # Not `<=`: a score that is not a number is a mistake.
    missed = ~(with_canary > threshold)
    return int(np.count_nonzero(without > threshold)), int(np.count_nonzero(missed))


def _histogram(without: Array, with_canary: Array) -> Histogram:
    scores = np.concatenate([without, with_canary])
    edges = np.histogram_bin_edges(scores[np.isfinite(scores)], bins=_BINS)
    counts = (tuple(np.histogram(world, edges)[0].tolist()) for world in (without, with_canary))
    return Histogram(tuple(edges.tolist()), *counts)
