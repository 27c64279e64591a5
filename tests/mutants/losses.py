"""Losses that let the batch's size through, and rounding that grows with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from opacus_bpclip.clipping import affine, fused_use
from opacus_bpclip.losses import criterion
from opacus_bpclip.losses.criterion import LossWatch
from opacus_bpclip.rules import AffineRule
from opacus_bpclip.rules import affine as affine_rules
from tests.mutants import loss_killers
from tests.mutants.registry import MOVED, mutant, take_for_a_mean


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
    take_for_a_mean(patch, True)


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


def _all_kept(
    remainder: Tensor, cancelled: Tensor, dtype: torch.dtype, limit: object = 0.0
) -> Tensor:
    return torch.ones_like(remainder)


@mutant(killed_by=loss_killers.blank_companions, says=MOVED)
def rounding_passed_down_by_norms(patch: pytest.MonkeyPatch) -> None:
    """A normalisation sends down what rounding has left of a gradient that it takes away, and the
    next one of constants multiplies it by 316."""
    patch.setattr(affine_rules, "cancellation_factor", _all_kept)


@mutant(killed_by=loss_killers.long_group_of_equal_gradients, says="is left where nothing is")
def means_left_in_norms_gradients(patch: pytest.MonkeyPatch) -> None:
    """The mean that a kernel has left in a long group's gradient, by adding up number by number, is
    not taken away, and is too large to be told from a gradient."""
    suppress_rounding = AffineRule.suppress_rounding

    def uncentred(*args: Any, centre: bool) -> Tensor:
        return suppress_rounding(*args, centre=False)

    patch.setattr(AffineRule, "suppress_rounding", uncentred)


@mutant(killed_by=loss_killers.positions_that_cancel_in_a_norm, says="rounding contributes")
def rounding_of_norms_clipped_as_a_gradient(patch: pytest.MonkeyPatch) -> None:
    """What rounding has left of a normalisation layer's own gradient goes to the limit."""
    patch.setattr(affine, "cancellation_factor", _all_kept)


@mutant(killed_by=loss_killers.positions_that_cancel_in_a_convolution, says="rounding contributes")
def rounding_of_own_gradients_clipped_as_a_gradient(patch: pytest.MonkeyPatch) -> None:
    """What rounding has left of an example's own gradient in the exact bound is held back by no
    more than the bound's slack, which a thousand equal companions make nothing of."""
    patch.setattr(fused_use, "cancellation_factor", _all_kept)
