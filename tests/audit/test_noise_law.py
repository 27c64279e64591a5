"""The law of the noise is judged with the power and the caution that the report claims."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from opacus_bpclip.audit.noise_law import judge
from opacus_bpclip.audit.trials import watched_entries
from tests.audit.mechanisms import ENTRIES, Gaussian


def test_noise_that_is_the_same_in_every_step_fails():
    rng = np.random.default_rng(0)
    law = judge(np.tile(rng.standard_normal((1, ENTRIES)), (500, 1)), "a batch", 1e-6)
    assert law.correlations["steps"][0] == pytest.approx(1.0)
    assert law.distinct == pytest.approx(1 / 500)
    assert len(law.violations) >= 3


@pytest.mark.parametrize("wrong", [0.95, 1.05])
def test_noise_five_percent_off_is_rejected_at_a_hundred_thousand_draws(wrong):
    noise = np.random.default_rng(1).standard_normal((10_000, 10))
    law = judge(noise, "a batch", 1e-6)
    assert (law.violations, law.doubts) == ((), ())
    assert "does not follow its law" in judge(noise * wrong, "a batch", 1e-6).violations[0]


def test_a_sample_too_small_to_reject_is_a_doubt_only_where_it_should_have_been_enough():
    few = judge(np.random.default_rng(2).standard_normal((20, 5)), "a batch", 1e-6)
    assert not few.rejects_wrong_scale
    assert few.doubts == ()


def test_a_test_that_would_pass_wrong_noise_is_a_doubt():
    law = judge(np.random.default_rng(1).standard_normal((10_000, 10)), "a batch", 1e-6)
    blind = replace(law, rejects_wrong_scale=False)
    assert blind.doubts == ("noise 5 % off its scale would pass on a batch",)
    assert replace(blind, p_value=0.0).doubts == ()


@pytest.mark.parametrize("steps", [5, 40, 300])
def test_faultless_noise_rarely_fails(steps):
    rng = np.random.default_rng(3)
    failures = [
        judge(rng.standard_normal((steps, 8)), "a batch", 0.01).violations for _ in range(60)
    ]
    # Three tests at 0.01 each: 1.8 expected, 10 with a chance below 1e-4.
    assert sum(bool(found) for found in failures) < 10


def test_watched_entries_take_turns_over_the_parameters():
    trainer = Gaussian(1.0)
    assert watched_entries(trainer, 4).tolist() == [0, 1, 15, 16]
    assert watched_entries(trainer, 1000).tolist() == list(range(ENTRIES))
