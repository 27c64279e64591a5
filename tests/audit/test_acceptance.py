"""The statistical audit at its full size. Slow: 28,000 training steps for each case."""

import pytest

from opacus_bpclip.audit import CASES, audit_case
from opacus_bpclip.audit.empirical import estimate
from opacus_bpclip.audit.job import run_task
from opacus_bpclip.audit.settings import Settings, tasks
from opacus_bpclip.audit.trials import run_trials
from tests.audit.test_mutants import noise_shrunk

pytestmark = pytest.mark.slow

STATISTICAL = [task for task in tasks(Settings()) if task.trials]


@pytest.mark.parametrize("task", STATISTICAL, ids=lambda task: task.name)
def test_at_noise_multiplier_one_the_audit_sees_most_of_mu_and_no_more(task):
    verdict = run_task(Settings(), task).verdict
    assert (verdict.violations, verdict.doubts) == ((), ())
    one, _ = verdict.empirical
    assert 0.8 * one.mu <= one.mu_lower <= one.mu
    assert one.control == 0.0
    assert [law.draws for law in verdict.noise] == [100_000, 100_000]
    assert all(law.rejects_wrong_scale for law in verdict.noise)


def test_identical_worlds_give_zero_through_the_real_engine():
    target = CASES["linear"].target("linear")
    done = run_trials(
        target, target.batches[0], None, noise_multiplier=1.0, trials=10_000, steps=1, seed=0
    )
    found = estimate(
        done.without,
        done.with_canary,
        steps=1,
        noise_multiplier=1.0,
        gap=done.gap,
        alpha=1e-6,
        delta=1e-5,
        expected=False,
    )
    assert (found.mu_lower, found.epsilon_lower) == (0.0, 0.0)


def test_noise_shrunk_by_a_fifth_is_seen_by_the_attacker_alone(monkeypatch):
    noise_shrunk(1.2)(monkeypatch)
    one, _ = audit_case("linear", searches=0).empirical
    assert one.mu_lower > one.mu
