"""What counts of wrong guesses say about privacy: bounds that hold with a stated confidence.

An attacker sees a release and guesses which of two neighbouring worlds it came from. Its rates of
false positives and false negatives limit how private the mechanism can be.
"""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.stats import beta, norm


def rate_upper_bound(count: int, trials: int, alpha: float) -> float:
    """Return an upper bound on a rate, wrong with probability at most ``alpha``.

    Source: Clopper and Pearson (1934), one-sided.

    Args:
        count: how often it happened.
        trials: how often it could have happened.
        alpha: chance of the bound to be below the true rate.

    Example:
        >>> round(rate_upper_bound(0, 100, 0.05), 4)  # "the rule of three"
        0.0295
    """
    if count >= trials:
        return 1.0
    return float(beta.isf(alpha, count + 1, trials - count))


def mu_lower_bound(false_positive_rate: float, false_negative_rate: float) -> float:
    """Return the smallest ``mu`` of Gaussian differential privacy that allows these rates.

    ``Phi^-1(1 - FPR) - Phi^-1(FNR)``; with upper bounds for the rates it is a lower bound on the
    mechanism's own ``mu``. A guess worse than chance tells nothing: below zero means zero.
    Source: Dong, Roth and Su, "Gaussian differential privacy" (2022).

    Example:
        >>> round(mu_lower_bound(norm.sf(0.5), norm.cdf(-0.5)), 6)
        1.0
        >>> mu_lower_bound(0.6, 0.7)
        0.0
    """
    return max(0.0, float(norm.isf(false_positive_rate) - norm.ppf(false_negative_rate)))


def epsilon_lower_bound(
    false_positive_rate: float, false_negative_rate: float, delta: float
) -> float:
    """Return the smallest epsilon that allows these rates, of any mechanism.

    Any (epsilon, delta)-private mechanism has ``1 - FNR <= exp(epsilon) FPR + delta``, and the same
    with the rates exchanged. Source: Kairouz, Oh and Viswanath (2015).

    Example:
        >>> round(epsilon_lower_bound(0.1, 0.1, 0.0), 4)  # log(0.9 / 0.1)
        2.1972
        >>> epsilon_lower_bound(0.6, 0.6, 0.0)
        0.0
    """
    rates = (false_positive_rate, false_negative_rate)
    odds = ((1 - delta - missed) / wrong for wrong, missed in (rates, rates[::-1]))
    return math.log(max(1.0, *odds))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return epsilon at ``delta`` of the Gaussian mechanism whose change is ``mu`` deviations.

    Solves ``delta = Phi(mu/2 - epsilon/mu) - exp(epsilon) Phi(-mu/2 - epsilon/mu)``.
    Source: Balle and Wang, "Improving the Gaussian mechanism" (2018), theorem 8.

    Example:
        >>> round(gaussian_epsilon(1.0, 1e-5), 3)
        4.377
    """

    def excess(epsilon: float) -> float:
        # In logarithms: exp(epsilon) alone may overflow.
        tail = math.exp(epsilon + float(norm.logcdf(-mu / 2 - epsilon / mu)))
        return float(norm.cdf(mu / 2 - epsilon / mu)) - tail - delta

    if excess(0.0) <= 0:
        return 0.0
    return float(brentq(excess, 0.0, mu * mu / 2 + mu * 40, xtol=1e-12))
