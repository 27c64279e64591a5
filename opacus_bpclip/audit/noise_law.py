"""The noise's law: Gaussian, of the claimed scale and no other, and fresh in every entry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kstest, t

Array = NDArray[np.float64]

# What the Kolmogorov-Smirnov test is taken on, where as many draws are at hand.
SAMPLE = 100_000

# Scales that must not pass, relative to the claimed one.
_WRONG_SCALES = (0.95, 1.05)
# Significance at which the test must reject these. No target fails by such a rejection.
_REJECTION = 1e-3
_LAGS = (1, 2, 3)
# Noise drawn in bfloat16 has some 5 % distinct values, in float16 less than 30 %.
_DISTINCT = 0.9


@dataclass(frozen=True)
class NoiseLaw:
    """What was seen of the noise over many steps on one batch.

    Attributes:
        batch: which batch it was.
        draws: entries that the law was judged by.
        scale: their root mean square over the claimed standard deviation.
        p_value: of Kolmogorov and Smirnov's test for the claimed normal law.
        rejects_wrong_scale: whether that test rejects scales 5 % off; it does at 100,000 draws.
        distinct: share of distinct values among the draws.
        correlations: the largest correlation, of either sign, and what it must not exceed: over
            ``"parameters"``, of two entries of one step, and over ``"steps"``, of entries of steps
            up to 3 apart.
        level: chance of faultless noise to fail one of the three tests.
    """

    batch: str
    draws: int
    scale: float
    p_value: float
    rejects_wrong_scale: bool
    distinct: float
    correlations: Mapping[str, tuple[float, float]]
    level: float

    @property
    def violations(self) -> tuple[str, ...]:
        """What breaks the claim."""
        found = []
        if self.p_value < self.level:
            found.append(
                f"the noise on {self.batch} does not follow its law: its scale is "
                f"{self.scale:.4g} of the claimed one (p = {self.p_value:.2g})"
            )
        if self.distinct < _DISTINCT:
            found.append(
                f"the noise on {self.batch} takes only {self.distinct:.0%} distinct values: it is "
                "drawn in low precision, or used again"
            )
        for kind, (value, limit) in self.correlations.items():
            if value > limit:
                found.append(
                    f"the noise on {self.batch} is correlated over {kind}: by {value:.3f}, "
                    f"{limit:.3f} allowed"
                )
        return tuple(found)

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why a pass would mean little."""
        if self.violations or self.rejects_wrong_scale or self.draws < SAMPLE:
            return ()
        return (f"noise 5 % off its scale would pass on {self.batch}",)


def judge(noise: Array, batch: str, level: float) -> NoiseLaw:
    """Judge noise in units of its claimed standard deviation.

    The mean is known to be zero, so a correlation is the cosine of two entries' draws: noise that
    is the same in every step does not hide behind its own mean.

    Args:
        noise: ``[steps, entries]``; entries that would be equal if layers shared a seed must be
            among them.
        batch: where it was added, for the text.
        level: chance of faultless noise to fail one of the three tests.
    """
    steps, entries = noise.shape
    sample = noise.reshape(-1)[:SAMPLE]
    finite = bool(np.isfinite(noise).all())
    correlations = {}
    for kind, lags in (("parameters", (0,)), ("steps", _LAGS)):
        count = sum(entries * entries if lag else entries * (entries - 1) // 2 for lag in lags)
        # The longest lag leaves the fewest steps to compare, and the loosest limit.
        limit = _cosine_limit(steps - max(lags), level / max(count, 1))
        correlations[kind] = max(_largest_correlation(noise, lag) for lag in lags), limit
    return NoiseLaw(
        batch=batch,
        draws=len(sample),
        scale=float(np.sqrt(np.mean(np.square(sample)))),
        p_value=_p_value(sample) if finite else 0.0,
        rejects_wrong_scale=all(_p_value(sample * wrong) < _REJECTION for wrong in _WRONG_SCALES),
        distinct=len(np.unique(sample)) / len(sample),
        correlations=correlations,
        level=level,
    )


def _p_value(sample: Array) -> float:
    return float(kstest(sample, "norm").pvalue)


def _largest_correlation(noise: Array, lag: int) -> float:
    early, late = (_unit_columns(part) for part in (noise[: len(noise) - lag], noise[lag:]))
    cosines = np.abs(early.T @ late)
    if not lag:
        np.fill_diagonal(cosines, 0.0)
    return float(cosines.max(initial=0.0))


def _unit_columns(noise: Array) -> Array:
    # Columns of zeros stay zeros: the test of the law rejects them.
    return noise / np.maximum(np.linalg.norm(noise, axis=0), np.finfo(noise.dtype).tiny)


def _cosine_limit(steps: int, level: float) -> float:
    """Return what the cosine of two Gaussian vectors exceeds with this chance, in either sign.

    ``cosine / sqrt((1 - cosine^2) / (steps - 1))`` has Student's law with ``steps - 1`` degrees.
    """
    freedom = max(steps - 1, 1)
    quantile = float(t.isf(level / 2, freedom))
    return quantile / math.sqrt(freedom + quantile**2)
