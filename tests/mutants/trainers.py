"""Trainers of other libraries whose steps are not those that are accounted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from opacus.accountants import create_accountant

from opacus_bpclip.engine.segments import Segments, total
from opacus_bpclip.hooks import BackpropClipHooks
from opacus_bpclip.integrations import spending
from opacus_bpclip.integrations.lightning.parts import Samples
from opacus_bpclip.integrations.spending import Spending
from opacus_bpclip.integrations.transformers import PrivateTrainer
from opacus_bpclip.optimizer.accounting import AccountStep
from opacus_bpclip.optimizer.optimizer import BackpropClipOptimizer
from opacus_bpclip.sampling.loader import PrivateDataLoader
from tests.mutants import trainer_killers as killers
from tests.mutants.registry import mutant


@mutant(killed_by=killers.resumed_run, says="the accountant has 2 of 4 steps")
def history_left_in_the_checkpoint(patch: pytest.MonkeyPatch) -> None:
    """A run that is resumed begins with an empty accountant: what the checkpoint has cost is
    forgotten."""
    patch.setattr(Spending, "take_over", lambda self, saved, branches: None)


@mutant(killed_by=killers.branched_run, says="the accountant has 6 of 8 steps")
def longest_branch_alone(patch: pytest.MonkeyPatch) -> None:
    """Of the branches of a run only the one with the most steps counts. Where two have trained at
    the same time, neither has the other's steps."""

    def longest(reports: Sequence[Segments]) -> Segments:
        return max(reports, key=lambda segments: total(segments).total())

    patch.setattr(spending, "union", longest)


@mutant(killed_by=killers.whole_run, says="the accountant has 0 of 2 steps")
def steps_counted_elsewhere(patch: pytest.MonkeyPatch) -> None:
    """The steps go to an accountant of one call of `train`, and the trainer's own stays empty."""
    make_private = PrivateTrainer._make_private

    def forgetful(self: PrivateTrainer, *args: Any) -> Any:
        private = make_private(self, *args)
        rate = private.optimizer.step_hook.sample_rate
        private.optimizer.step_hook = AccountStep(create_accountant("rdp"), rate)
        return private

    patch.setattr(PrivateTrainer, "_make_private", forgetful)


@mutant(killed_by=killers.one_step_of_equal_examples, says="moved by .* times the claim")
def accumulation_over_samples(patch: pytest.MonkeyPatch) -> None:
    """One step of the trainer accumulates two samples and counts as one, and nothing refuses it: an
    example that is in both contributes twice."""
    training_step = PrivateTrainer.training_step

    def twice(self: PrivateTrainer, model: Any, inputs: Any, *args: Any) -> Any:
        loss = training_step(self, model, inputs, *args)
        training_step(self, model, next(self._batches), *args)
        return loss

    patch.setattr(PrivateTrainer, "training_step", twice)
    patch.setattr(BackpropClipHooks, "forbid_grad_accumulation", lambda self: None)
    patch.setattr(BackpropClipHooks, "_sample_from", lambda self, samples: None)
    patch.setattr(BackpropClipOptimizer, "accumulated_iterations", 1)
    patch.setattr(PrivateDataLoader, "in_parts", lambda self, rows: None)


@mutant(killed_by=killers.one_step_of_a_repeated_closure, says="moved the step by .* times the")
def parts_run_twice(patch: pytest.MonkeyPatch) -> None:
    """Lightning's closure may run a second time on one sample, whose parts after the first are
    gone: the examples of the first part contribute twice."""
    patch.setattr(Samples, "begin", lambda self: None)
