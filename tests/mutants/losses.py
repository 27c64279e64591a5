"""Losses that let the batch's size through, and rounding that grows with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from opacus_bpclip.clipping import affine, fused_use
from opacus_bpclip.losses import criterion
from opacus_bpclip.losses.criterion import LossWatch
from opacus_bpclip.losses.trials import Trials
from opacus_bpclip.probe import rows
from opacus_bpclip.probe.batches import Batch
from opacus_bpclip.rules import AffineRule
from opacus_bpclip.rules import affine as affine_rules
from tests.mutants import loss_killers
from tests.mutants.registry import MOVED, mutant, take_for_a_mean


@mutant(killed_by=loss_killers.criterion_together_and_alone, says="together and alone differ")
def criterion_divides_its_gradient(patch: pytest.MonkeyPatch) -> None:
    """The criterion's gradient is that of the mean, and the layers treat it as that of the sum: one
    more example shrinks the contributions of all others."""
    backward = criterion._Undivided.backward

    def divided(ctx: Any, g: Tensor) -> tuple[None, Tensor, None]:
        return backward(ctx, g / max(ctx.shape.numel(), 1))

    patch.setattr(criterion._Undivided, "backward", staticmethod(divided))


@mutant(killed_by=loss_killers.criterion_together_and_alone, says="together and alone differ")
def mean_undone_behind_a_criterion(patch: pytest.MonkeyPatch) -> None:
    """The layers multiply the gradient by the batch's size, although the criterion has not divided
    it."""
    take_for_a_mean(patch, True)


@mutant(killed_by=loss_killers.loss_around_the_criterion, says="nothing bounds was released")
def losses_around_the_criterion_let_through(patch: pytest.MonkeyPatch) -> None:
    """It is not checked that a backward pass comes through the criterion: a plain mean's division
    by the batch's size is never undone."""
    patch.setattr(LossWatch, "problem", lambda self, name: None)


@mutant(killed_by=loss_killers.flattened_rows, says="nothing bounds was released")
def rows_taken_for_examples(patch: pytest.MonkeyPatch) -> None:
    """The number of losses is not compared with the number of examples: a mean over all positions
    is treated as one term for each example."""
    patch.setattr(LossWatch, "require_examples", lambda self, losses: None)


def _all_kept(
    remainder: Tensor, cancelled: Tensor, dtype: torch.dtype, limit: object = 0.0
) -> Tensor:
    return torch.ones_like(remainder)


@mutant(killed_by=loss_killers.blank_companions, says=MOVED)
def rounding_passed_down_by_norms(patch: pytest.MonkeyPatch) -> None:
    """A normalisation sends on the rounding errors of a gradient that cancels, and the next one, on
    constants, multiplies them by 316."""
    patch.setattr(affine_rules, "cancellation_factor", _all_kept)


@mutant(killed_by=loss_killers.long_group_of_equal_gradients, says="is left where nothing is")
def means_left_in_norms_gradients(patch: pytest.MonkeyPatch) -> None:
    """The mean that a kernel leaves in the gradient of a long group, which it adds up number by
    number, is not subtracted. It is too large to be recognised as rounding."""
    suppress_rounding = AffineRule.suppress_rounding

    def uncentred(*args: Any, centre: bool) -> Tensor:
        return suppress_rounding(*args, centre=False)

    patch.setattr(AffineRule, "suppress_rounding", uncentred)


@mutant(killed_by=loss_killers.positions_that_cancel_in_a_norm, says="rounding contributes")
def rounding_of_norms_clipped_as_a_gradient(patch: pytest.MonkeyPatch) -> None:
    """The rounding errors of a normalisation layer's gradient that cancels are clipped like a
    gradient, and may be as large as the limit."""
    patch.setattr(affine, "cancellation_factor", _all_kept)


@mutant(killed_by=loss_killers.positions_that_cancel_in_a_convolution, says="rounding contributes")
def rounding_of_own_gradients_clipped_as_a_gradient(patch: pytest.MonkeyPatch) -> None:
    """The rounding errors of a per-example gradient that cancels, in the exact bound, are limited
    only by the bound's slack, which a thousand equal examples exceed."""
    patch.setattr(fused_use, "cancellation_factor", _all_kept)


@mutant(killed_by=loss_killers.lists_of_boxes, says="was not found")
def lists_of_targets_left_whole(patch: pytest.MonkeyPatch) -> None:
    """Half of the examples are tried with the list of all targets: a criterion that goes through
    the list fails, which counts as nothing found."""

    def whole(args: Any, kwargs: Any, chosen: Any, size: int) -> Batch:
        return Batch(args, kwargs, size, 0).select(chosen)

    patch.setattr(rows, "_selected", whole)


@mutant(killed_by=loss_killers.criterion_that_is_switched_on, says="was accepted")
def criterion_tried_once(patch: pytest.MonkeyPatch) -> None:
    """A criterion is tried for coupled examples in its first call alone, and couples them in a
    later epoch."""

    def is_new(self: Trials, form: object) -> bool:
        self._forms[form].calls += 1
        return self._forms[form].calls == 1

    patch.setattr(Trials, "are_due", is_new)
