"""The whole audit of a mechanism that is right, and its arguments."""

from __future__ import annotations

import re

import pytest
import torch

from opacus_bpclip.audit import audit
from tests.audit.mechanisms import target


def test_the_right_mechanism_passes_all_checks():
    verdict = audit(target(), trials=4000)
    assert (verdict.violations, verdict.doubts, verdict.outcome) == ((), (), "pass")
    assert verdict.neighbours.change == pytest.approx(1.0)
    one, several = verdict.empirical
    assert 0.7 <= one.tightness <= 1
    assert (one.mu, one.steps, one.trials) == (1.0, 1, 4000)
    # Four steps at twice the noise: the same mu, less of it seen in a tenth of the trials.
    assert (several.mu, several.steps, several.trials) == (1.0, 4, 400)
    assert 0.2 < several.tightness < 1
    assert one.epsilon_lower < one.epsilon
    assert one.control == several.control == 0.0
    assert [law.draws for law in verdict.noise] == [100_000, 48_000]
    for law in verdict.noise:
        assert law.rejects_wrong_scale
        assert law.p_value > 1e-3


def test_an_audit_repeats_itself_and_leaves_the_global_generator_alone():
    torch.manual_seed(4)
    before = torch.get_rng_state()
    first, second = (audit(target(), trials=200, seed=3) for _ in range(2))
    assert first == second
    assert audit(target(), trials=200, seed=4) != first
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"trials": 99}, "Expected trials=99 to be 0 or at least 100."),
        ({"trials": -1}, "Expected trials=-1 to be 0 or at least 100."),
        ({"noise_multiplier": 0.0}, "Expected noise_multiplier=0.0 to be a number > 0."),
    ],
)
def test_too_little_to_judge_by_is_an_error(options, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        audit(target(), **options)
