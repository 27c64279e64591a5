"""The statistical audit at its full size. Slow: 28,000 training steps for each case."""

import pytest

from opacus_bpclip.audit import CASES, audit
from opacus_bpclip.audit.job import run_task
from opacus_bpclip.audit.settings import Settings, tasks
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


def test_noise_shrunk_by_a_fifth_is_seen_by_the_attacker_alone(monkeypatch):
    noise_shrunk(1.2)(monkeypatch)
    one, _ = audit(CASES["linear"].target("linear"), searches=0).empirical
    assert one.mu_lower > one.mu
