"""Each way to get the Gaussian mechanism wrong fails the audit, and says why."""

from __future__ import annotations

import pytest
import torch

from opacus_bpclip.audit import audit
from tests.audit.mechanisms import ENTRIES, Gaussian, clipped, noise, target


def clipped_together(self):
    """One factor for the whole batch: one example decides how much the others count."""
    return self.rows / max(1.0, float(self.rows.norm())) * 3


def spoiled_by_size(self):
    return Gaussian.clipped(self) * (torch.nan if (self.rows.abs() > 1e3).any() else 1)


def large_negative_entries_get_past_the_clip(self):
    return self.rows / self.rows.clamp(min=0).norm(dim=1, keepdim=True).clamp(min=1)


def noise_follows_data(self):
    return Gaussian.noise(self) * (1 + 0.01 * len(self.rows))


def one_draw_for_each_example(self):
    return torch.stack([Gaussian.noise(self) for _ in range(1 + len(self.rows))])[0]


def many_draws(self):
    for _ in range(4 + len(self.rows)):
        torch.rand(1)
    return Gaussian.noise(self)


def no_step(self):
    for p in self.parameters:
        p.grad = None


def no_step_on_an_empty_batch(self):
    Gaussian.step(self)
    if not len(self.rows):
        no_step(self)


def accounted_for_full_batches(self):
    return Gaussian.history(self) if len(self.rows) else []


def accounted_twice(self):
    return [(self.noise_multiplier, 1.0, 2)]


def right_at_a_noise_multiplier_of_one(self):
    return torch.randn(ENTRIES) * float(self.noise_multiplier > 0)


def each_draw_serves_two_steps(self):
    if self.steps % 2:
        self.drawn = Gaussian.noise(self)
    return self.drawn


def uniform(self):
    return (torch.rand(ENTRIES) * 2 - 1) * 3**0.5 * self.noise_multiplier


SENSITIVITY = [
    (clipped(lambda rows: rows * 1.01), "moves the sum by 1.01 times the claimed sensitivity ("),
    ({"clipped": clipped_together}, "times the claimed sensitivity"),
    ({"clipped": spoiled_by_size}, "one example moves the sum by inf times"),
    ({"clipped": large_negative_entries_get_past_the_clip}, "(a made-up example added to "),
]
REPLAY = [
    ({"noise": noise_follows_data}, "the same randomness gives other noise: apart by 0.0"),
    (
        {"noise": one_draw_for_each_example},
        "the random calls depend on the data: aten.randn[][30] float32",
    ),
    ({"noise": many_draws}, "and 2 more without the canary"),
    ({"step": no_step_on_an_empty_batch}, "whether the step is skipped depends on the data"),
    ({"step": no_step}, "the step was skipped: nothing was released"),
    (
        {"history": accounted_for_full_batches},
        "the accountant's entries depend on the data (beside an empty batch)",
    ),
    ({"history": accounted_twice}, "one step was accounted as 2 at noise multiplier 1, not 1 at 1"),
]
NOISE = [
    (noise(lambda drawn: drawn / 1.2), "does not follow its law: its scale is 0.83"),
    (
        {"noise": right_at_a_noise_multiplier_of_one},
        "the noise on an empty batch does not follow its law",
    ),
    (noise(lambda drawn: drawn[: ENTRIES // 2].repeat(2)), "is correlated over parameters: by 1.0"),
    ({"noise": each_draw_serves_two_steps}, "is correlated over steps"),
    (
        noise(lambda drawn: drawn.half().float()),
        "distinct values: it is drawn in low precision, or used again",
    ),
    ({"noise": uniform}, "the noise on an ordinary batch does not follow its law"),
    (noise(lambda drawn: drawn * torch.nan), "does not follow its law: its scale is nan"),
    # A step that releases nothing is no evidence.
    ({"step": no_step}, "the noise on an ordinary batch does not follow its law: its scale is nan"),
]


@pytest.mark.parametrize(
    ("methods", "trials", "text"),
    [
        *((methods, 0, text) for methods, text in SENSITIVITY + REPLAY),
        *((methods, 400, text) for methods, text in NOISE),
    ],
)
def test_a_wrong_mechanism_fails(methods, trials, text):
    verdict = audit(target(**methods), trials=trials, alpha=1e-4)
    assert verdict.outcome == "violation"
    assert text in "; ".join(verdict.violations)


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


def draws_before_the_step(self, batch):
    torch.rand(len(batch[0]))
    Gaussian.compute(self, batch)


@pytest.mark.parametrize(
    "methods", [{"compute": draws_before_the_step}, {"history": lambda self: ()}]
)
def test_dropout_and_a_missing_accountant_are_no_faults(methods):
    verdict = audit(target(**methods), trials=0)
    assert verdict.outcome == "pass"
    assert (verdict.replay.draws, verdict.replay.pairs) == (1, 2)


def test_a_worst_case_that_falls_short_is_a_doubt():
    half = clipped(lambda rows: rows / 2)
    verdict = audit(target(**half), trials=0)
    assert verdict.outcome == "inconclusive"
    assert verdict.doubts == ("the worst case reaches only 0.5 of the sensitivity",)
    # Nobody promised that it would be reached.
    assert audit(target(**half, attained=False), trials=0).outcome == "pass"


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
        ({"trials": 99}, r"Expected trials=99 to be 0 or at least 100\."),
        ({"trials": -1}, r"Expected trials=-1 to be 0 or at least 100\."),
        ({"noise_multiplier": 0.0}, r"Expected noise_multiplier=0\.0 to be a number > 0\."),
    ],
)
def test_too_little_to_judge_by_is_an_error(options, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        audit(target(), **options)
