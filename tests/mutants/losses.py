"""Losses that let the batch's size through."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from opacus_bpclip import criterion, grad_sample_module
from opacus_bpclip.criterion import LossWatch
from tests.mutants import loss_killers
from tests.mutants.registry import mutant


@mutant(killed_by=loss_killers.criterion_together_and_alone, says="together and alone differ")
def criterion_divides_its_gradient(patch: pytest.MonkeyPatch) -> None:
    """The criterion's gradient is that of the mean, and the layers take it for the sum's: one
    example more shrinks all the others."""
    backward = criterion._Undivided.backward

    def divided(ctx: Any, g: Tensor) -> tuple[None, Tensor, None]:
        return backward(ctx, g / max(ctx.shape.numel(), 1))

    patch.setattr(criterion._Undivided, "backward", staticmethod(divided))


@mutant(killed_by=loss_killers.criterion_together_and_alone, says="together and alone differ")
def mean_undone_behind_a_criterion(patch: pytest.MonkeyPatch) -> None:
    """The layers multiply by the batch's size what a criterion has never divided by it."""
    layer_clips = grad_sample_module.layer_clips
    patch.setattr(
        grad_sample_module, "layer_clips", lambda *args, mean: layer_clips(*args, mean=True)
    )


@mutant(killed_by=loss_killers.loss_around_the_criterion, says="nothing bounds was released")
def losses_around_the_criterion_let_through(patch: pytest.MonkeyPatch) -> None:
    """Nobody checks that a backward pass came through the criterion: a plain mean's division by the
    batch's size is never undone."""
    patch.setattr(LossWatch, "problem", lambda self, name: None)


@mutant(killed_by=loss_killers.flattened_rows, says="nothing bounds was released")
def rows_taken_for_examples(patch: pytest.MonkeyPatch) -> None:
    """Nobody compares the number of losses with the number of examples: a mean over all positions
    passes for one term for each example."""
    patch.setattr(LossWatch, "require_examples", lambda self, losses: None)
