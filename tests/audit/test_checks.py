"""Each check passes the right mechanism, and convicts one that is wrong in its own way."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from opacus_bpclip.audit import Target, audit
from opacus_bpclip.audit.empirical import estimate
from opacus_bpclip.audit.neighbours import NeighbourSearch
from opacus_bpclip.audit.noise_law import judge
from opacus_bpclip.audit.replay import replay
from opacus_bpclip.audit.trials import run_trials, watched_entries
from tests.audit.mechanisms import ENTRIES, Gaussian, target


def convicted(kind: type[Gaussian], trials: int = 0) -> str:
    """Audit a mechanism that is wrong, and return what it is convicted of."""
    verdict = audit(target(kind), trials=trials, alpha=1e-4)
    assert verdict.outcome == "violation"
    assert verdict.violations
    return "; ".join(verdict.violations)


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


class ClippedTooHigh(Gaussian):
    def clipped(self):
        return super().clipped() * 1.01


class ClippedTogether(Gaussian):
    """One factor for the whole batch: one example decides how much the others count."""

    def clipped(self):
        return self.rows / max(1.0, float(self.rows.norm()) if len(self.rows) else 1.0) * 3


def test_neighbours_convict_a_bound_that_is_one_percent_off():
    text = convicted(ClippedTooHigh)
    assert text.startswith("one example moves the sum by 1.01 times the claimed sensitivity (")


def test_neighbours_convict_coupling_among_the_examples():
    assert "times the claimed sensitivity" in convicted(ClippedTogether)


class SpoiledBySize(Gaussian):
    def clipped(self):
        large = bool((self.rows.abs() > 1e3).any())
        return super().clipped() * (torch.nan if large else 1)


def test_neighbours_convict_a_sum_that_is_not_finite():
    assert convicted(SpoiledBySize).startswith("one example moves the sum by inf times")


def test_the_search_finds_what_the_targets_own_canaries_do_not_show():
    class WrongWayRound(Gaussian):
        """Only large negative entries get past the clip."""

        def clipped(self):
            return self.rows / self.rows.clamp(min=0).norm(dim=1, keepdim=True).clamp(min=1)

    found = NeighbourSearch(target(WrongWayRound), seed=0)
    assert found.result.change > 100
    assert "a made-up example" in found.result.where
    assert not torch.equal(found.canary[0], target().canaries[0][0])


def test_a_target_without_canaries_has_its_own_examples_tried():
    whole = target()
    bare = Target(whole.name, whole.make, whole.batches)
    found = NeighbourSearch(bare, seed=0, searches=0)
    assert found.result.pairs == 2 * len(whole.batches[0][0])
    assert "example" in found.result.where


def test_examples_of_ids_are_only_rearranged():
    class Counts(Gaussian):
        def compute(self, batch):
            (ids,) = batch
            assert ids.unique().tolist() == sorted(set(ids.unique().tolist()) & {0, 1, 2, 3, 4})
            self.rows = torch.zeros(len(ids), ENTRIES).scatter_add(1, ids, torch.ones(ids.shape))

    ids = torch.tensor([[0, 1, 4], [2, 2, 3]])
    found = NeighbourSearch(Target("ids", Counts, ((ids,),)), seed=0)
    assert found.result.violations == ()
    assert found.result.change == pytest.approx(1.0)


def test_a_worst_case_that_falls_short_is_a_doubt():
    class HalfUsed(Gaussian):
        def clipped(self):
            return super().clipped() / 2

    verdict = audit(target(HalfUsed), trials=0)
    assert verdict.outcome == "asleep"
    assert verdict.doubts == ("the worst case reaches only 0.5 of the sensitivity",)
    # Nobody promised that it would be reached.
    assert audit(target(HalfUsed, attained=False), trials=0).outcome == "pass"


class NoiseFollowsData(Gaussian):
    def noise(self):
        return super().noise() * (1 + 0.01 * len(self.rows))


class DrawsForEachExample(Gaussian):
    def noise(self):
        drawn = [super(DrawsForEachExample, self).noise() for _ in range(1 + len(self.rows))]
        return drawn[0]


class ManyDraws(Gaussian):
    def noise(self):
        for _ in range(4 + len(self.rows)):
            torch.rand(1)
        return super().noise()


class SkipsEmptyBatches(Gaussian):
    def step(self):
        super().step()
        if not len(self.rows):
            for p in self.parameters:
                p.grad = None


class SkipsAll(Gaussian):
    def step(self):
        for p in self.parameters:
            p.grad = None


class AccountsForFull(Gaussian):
    def history(self):
        return super().history() if len(self.rows) else []


class AccountsTwice(Gaussian):
    def history(self):
        return [(self.noise_multiplier, 1.0, 2)]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (NoiseFollowsData, "the same randomness gives other noise: apart by 0.0"),
        (DrawsForEachExample, "the random calls depend on the data: aten.randn[][30] float32"),
        (ManyDraws, "and 2 more without the canary"),
        (SkipsEmptyBatches, "whether the step is skipped depends on the data"),
        (SkipsAll, "the step was skipped: nothing was released"),
        (AccountsForFull, "the accountant's entries depend on the data (beside an empty batch)"),
        (AccountsTwice, "one step was accounted as 2 at noise multiplier 1, not 1 at 1"),
    ],
)
def test_replay_convicts(kind, text):
    assert text in convicted(kind)


def test_replay_ignores_what_is_random_before_the_step():
    class Dropout(Gaussian):
        def compute(self, batch):
            torch.rand(len(batch[0]))
            super().compute(batch)

    result = replay(target(Dropout), target().canaries[0], noise_multiplier=1.0, seed=0)
    assert (result.violations, result.draws, result.pairs) == ((), 1, 2)


class NoHistory(Gaussian):
    def history(self):
        return ()


def test_a_trainer_need_not_have_an_accountant():
    assert audit(target(NoHistory), trials=0).outcome == "pass"


class Shrunk(Gaussian):
    def noise(self):
        return super().noise() / 1.2


class ForgottenMultiplier(Gaussian):
    """Right at a noise multiplier of 1 only."""

    def noise(self):
        return torch.randn(ENTRIES) * float(self.noise_multiplier > 0)


class SharedSeed(Gaussian):
    def noise(self):
        return super().noise()[: ENTRIES // 2].repeat(2)


class Reused(Gaussian):
    """Each draw serves two steps."""

    def noise(self):
        if self.steps % 2:
            self.drawn = super().noise()
        return self.drawn


class Halved(Gaussian):
    """Drawn in half precision."""

    def noise(self):
        return super().noise().half().float()


class Uniform(Gaussian):
    """The right scale, the wrong law."""

    def noise(self):
        return (torch.rand(ENTRIES) * 2 - 1) * 3**0.5 * self.noise_multiplier


class Nan(Gaussian):
    def noise(self):
        return super().noise() * torch.nan


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Shrunk, "does not follow its law: its scale is 0.83"),
        (ForgottenMultiplier, "the noise on an empty batch does not follow its law"),
        (SharedSeed, "is correlated over parameters: by 1.000"),
        (Reused, "is correlated over steps"),
        (Halved, "distinct values: it is drawn in low precision, or used again"),
        (Uniform, "the noise on an ordinary batch does not follow its law"),
        (Nan, "does not follow its law: its scale is nan"),
    ],
)
def test_the_noise_is_convicted(kind, text):
    assert text in convicted(kind, trials=400)


def test_noise_that_is_the_same_in_every_step_is_convicted():
    rng = np.random.default_rng(0)
    law = judge(np.tile(rng.standard_normal((1, ENTRIES)), (500, 1)), "a batch", 1e-6)
    assert law.correlation_steps == pytest.approx(1.0)
    assert law.distinct == pytest.approx(1 / 500)
    assert len(law.violations) >= 3


@pytest.mark.parametrize("wrong", [0.95, 1.05])
def test_noise_five_percent_off_is_rejected_at_a_hundred_thousand_draws(wrong):
    noise = np.random.default_rng(1).standard_normal((10_000, 10))
    assert judge(noise, "a batch", 1e-6).violations == ()
    assert judge(noise, "a batch", 1e-6).doubts == ()
    assert "does not follow its law" in judge(noise * wrong, "a batch", 1e-6).violations[0]


def test_a_sample_too_small_to_reject_is_a_doubt_only_where_it_should_have_been_enough():
    few = judge(np.random.default_rng(2).standard_normal((20, 5)), "a batch", 1e-6)
    assert not few.rejects_wrong_scale
    assert few.doubts == ()


@pytest.mark.parametrize("steps", [5, 40, 300])
def test_faultless_noise_is_rarely_convicted(steps):
    rng = np.random.default_rng(3)
    convictions = [
        judge(rng.standard_normal((steps, 8)), "a batch", 0.01).violations for _ in range(60)
    ]
    # Three tests at 0.01 each: 1.8 expected, 10 with a chance below 1e-4.
    assert sum(bool(found) for found in convictions) < 10


def test_watched_entries_take_turns_over_the_parameters():
    trainer = Gaussian(1.0)
    assert watched_entries(trainer, 4).tolist() == [0, 1, 15, 16]
    assert watched_entries(trainer, 1000).tolist() == list(range(ENTRIES))


def test_identical_worlds_give_zero():
    batch = target().batches[0]
    done = run_trials(target(), batch, None, noise_multiplier=1.0, trials=2000, steps=1, seed=0)
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
    assert found.gap == 1.0
    assert (found.mu_lower, found.epsilon_lower, found.control) == (0.0, 0.0, 0.0)


def estimated(without, with_canary, **options):
    return estimate(
        np.asarray(without, dtype=float),
        np.asarray(with_canary, dtype=float),
        **{
            "steps": 1,
            "noise_multiplier": 1.0,
            "gap": 1.0,
            "alpha": 1e-6,
            "delta": 1e-5,
            "expected": True,
            **options,
        },
    )


def test_worlds_told_apart_too_well_are_convicted():
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
