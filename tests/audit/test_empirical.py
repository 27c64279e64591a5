"""What an attacker achieves is bounded, compared and doubted."""

from __future__ import annotations

import numpy as np
import pytest

from opacus_bpclip.audit import CASES
from opacus_bpclip.audit.empirical import estimate
from opacus_bpclip.audit.target import empty
from opacus_bpclip.audit.trials import Trials, run_trials
from tests.audit.mechanisms import target


@pytest.mark.parametrize(
    ("audited", "trials"),
    [
        (target(), 2000),
        pytest.param(CASES["linear"].target("linear"), 10_000, marks=pytest.mark.slow),
    ],
)
def test_identical_worlds_give_zero(audited, trials):
    batch = audited.batches[0]
    done = run_trials(
        audited, batch, empty(batch), noise_multiplier=1.0, trials=trials, steps=1, seed=0
    )
    found = estimate(done, alpha=1e-6, delta=1e-5, expected=False)
    assert found.gap == 1.0
    assert (found.mu_lower, found.epsilon_lower, found.control) == (0.0, 0.0, 0.0)


def estimated(without, with_canary, *, steps=1, noise_multiplier=1.0, expected=True):
    done = Trials(steps, noise_multiplier, 1.0, without, with_canary, np.empty((0, 1)))
    return estimate(done, alpha=1e-6, delta=1e-5, expected=expected)


def test_worlds_told_apart_too_well_are_a_violation():
    found = estimated(np.zeros(20_000), np.ones(20_000))
    assert found.violations[0].startswith("one step: mu is at least 6.")
    assert found.violations[1].startswith("one step: epsilon is at least 7.")
    assert "claimed 4.377 at delta 1e-05" in found.violations[1]
    several = estimated(np.zeros(500), np.ones(500), steps=4, noise_multiplier=2.0)
    assert several.violations[0].startswith("4 steps: mu is at least ")


def test_a_score_that_is_not_a_number_is_a_mistake():
    found = estimated(np.zeros(100), np.full(100, np.nan))
    assert (found.false_positives, found.false_negatives) == (0, 100)
    assert found.mu_lower == 0.0
    assert sum(found.histogram.with_canary) == 0


def test_an_attack_that_sees_little_is_a_doubt_only_with_enough_trials():
    rng = np.random.default_rng(5)
    blind = rng.standard_normal((2, 10_000))
    assert estimated(*blind).doubts == ("only 0% of the claimed mu was seen",)
    assert estimated(*blind[:, :5000]).doubts == ()
    assert estimated(*blind, expected=False).doubts == ()


def test_a_world_that_differs_from_itself_is_a_doubt():
    drifting = np.concatenate([np.zeros(5000), np.ones(5000)])
    (text,) = estimated(drifting, drifting, expected=False).doubts
    assert text.startswith("a world differs from itself: mu at least ")
