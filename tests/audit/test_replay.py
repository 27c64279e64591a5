"""The replay convicts whatever is random and depends on the data."""

from __future__ import annotations

import pytest
import torch

from opacus_bpclip.audit import audit
from opacus_bpclip.audit.replay import replay
from tests.audit.mechanisms import Gaussian, convicted, target


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


def test_steps_that_release_nothing_are_no_evidence_in_trials():
    text = convicted(SkipsAll, trials=100)
    assert "the noise on an ordinary batch does not follow its law: its scale is nan" in text


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
