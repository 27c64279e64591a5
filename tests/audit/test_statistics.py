"""The bounds hold as often as they say, and are as tight as is known."""

import math

import numpy as np
import pytest
from opacus.accountants import create_accountant
from scipy.stats import binom, norm

from opacus_bpclip.audit.statistics import (
    epsilon_lower_bound,
    gaussian_epsilon,
    mu_lower_bound,
    rate_upper_bound,
)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_rate_bound_is_wrong_no_more_often_than_it_says(rate):
    trials, alpha = 200, 0.05
    bounds = np.array([rate_upper_bound(count, trials, alpha) for count in range(trials + 1)])
    below = binom.pmf(np.arange(trials + 1), trials, rate)[bounds < rate].sum()
    assert below <= alpha
    assert below > alpha / 3  # not idle either


def test_rate_bound_at_its_ends():
    assert rate_upper_bound(50, 50, 0.01) == 1.0
    assert rate_upper_bound(0, 50, 0.01) == pytest.approx(1 - 0.01 ** (1 / 50))


@pytest.mark.parametrize("mu", [0.1, 1.0, 3.0])
def test_mu_of_the_gaussian_mechanisms_own_rates(mu):
    assert mu_lower_bound(norm.sf(mu / 2), norm.cdf(-mu / 2)) == pytest.approx(mu)
    # Any threshold tells the same.
    assert mu_lower_bound(norm.sf(1.2), norm.cdf(1.2 - mu)) == pytest.approx(mu)


def test_a_guess_worse_than_chance_is_no_evidence():
    assert mu_lower_bound(0.9, 0.9) == 0.0
    assert mu_lower_bound(1.0, 1.0) == 0.0
    assert epsilon_lower_bound(0.9, 0.9, 1e-5) == 0.0
    assert epsilon_lower_bound(1.0, 1.0, 1e-5) == 0.0


def test_epsilon_takes_the_stronger_of_the_two_sides():
    assert epsilon_lower_bound(0.01, 0.5, 0.0) == pytest.approx(math.log(0.5 / 0.01))
    assert epsilon_lower_bound(0.5, 0.01, 0.0) == pytest.approx(math.log(0.5 / 0.01))
    assert epsilon_lower_bound(0.01, 0.5, 0.1) == pytest.approx(math.log(0.4 / 0.01))


@pytest.mark.parametrize("mu", [0.05, 0.5, 1.0, 2.0, 8.0, 100.0])
def test_gaussian_epsilon_solves_its_equation(mu):
    delta = 1e-5
    epsilon = gaussian_epsilon(mu, delta)
    tail = math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))
    assert norm.cdf(mu / 2 - epsilon / mu) - tail == pytest.approx(delta, rel=1e-6)


@pytest.mark.filterwarnings("ignore:divide by zero")  # Opacus's, at a sampling rate of 1
def test_gaussian_epsilon_agrees_with_opacus():
    accountant = create_accountant("prv")
    accountant.history = [(1.0, 1.0, 1)]
    claimed = accountant.get_epsilon(delta=1e-5)
    # Opacus's is an upper bound, by its own error bar of 0.01.
    assert gaussian_epsilon(1.0, 1e-5) <= claimed <= gaussian_epsilon(1.0, 1e-5) + 0.02


def test_gaussian_epsilon_is_zero_where_delta_covers_it():
    assert gaussian_epsilon(0.01, 0.1) == 0.0


def test_no_gaussian_test_beats_the_claimed_epsilon():
    mu, delta = 1.5, 1e-3
    for threshold in np.linspace(-4, 6, 50):
        rates = norm.sf(threshold), norm.cdf(threshold - mu)
        assert epsilon_lower_bound(*rates, delta) <= gaussian_epsilon(mu, delta) + 1e-9
