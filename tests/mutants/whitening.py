"""Whitening that measures something else than it sums, or that looks at the private batch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
from torch import Tensor, nn

from opacus_bpclip import hooks
from opacus_bpclip.clipping import at_once, whitening
from opacus_bpclip.clipping.fused import FusedClip
from opacus_bpclip.clipping.whitening import LayerWhitening
from opacus_bpclip.config import InputWhitening
from opacus_bpclip.engine import validation
from opacus_bpclip.rules.whitened import PublicMatrix, WhitenedRule
from tests.mutants import whitening_killers as killers
from tests.mutants.registry import MOVED, mutant


@mutant(killed_by=killers.private_inputs_far_from_the_public_ones, says="together and alone differ")
def learnt_from_the_private_batch(patch: pytest.MonkeyPatch) -> None:
    """The matrices are learnt from the examples that are trained on: each example changes the
    gradients of all others."""
    call = FusedClip.call

    def learning(self: FusedClip, module: Any, args: Any, kwargs: Any, y: Tensor) -> Any:
        own = LayerWhitening(self.layer, InputWhitening(lambda _: None))
        own.learn(own.second_moments(args[0].detach(), None))
        self.public = own.matrix
        return call(self, module, args, kwargs, y)

    patch.setattr(FusedClip, "call", learning)


@mutant(killed_by=killers.a_small_direction_at_one_position, says=MOVED)
def measured_before_it_is_whitened(patch: pytest.MonkeyPatch) -> None:
    """The norm is that of the gradient before it is whitened, which makes it larger."""
    patch.setattr(WhitenedRule, "stretched", lambda self, columns: columns)
    patch.setattr(WhitenedRule, "exact_bound", lambda self, *args: self.one.exact_bound(*args))


@mutant(killed_by=killers.a_large_direction_at_many_positions, says=MOVED)
def summed_without_being_whitened(patch: pytest.MonkeyPatch) -> None:
    """The whitened columns of many positions are measured, and the plain ones are summed."""

    def plain(self: WhitenedRule, *args: Any, **kwargs: Any) -> Any:
        return self.one.gradients(*args, **kwargs)

    patch.setattr(WhitenedRule, "gradients", plain)


@mutant(killed_by=killers.a_small_direction_by_itself, says=MOVED)
def own_gradients_whitened_when_they_are_summed(patch: pytest.MonkeyPatch) -> None:
    """Per-example gradients are measured first, and their sum is whitened."""
    patch.setattr(WhitenedRule, "own_gradients", lambda self, *args: self.one.own_gradients(*args))
    clip_own = at_once._clip_own

    def whitened_later(use: Any, factors_of: Any) -> Any:
        clipped = clip_own(use, factors_of)
        clipped.sums["weight"] = use.rule._whitened(clipped.sums["weight"], use.weight)
        return clipped

    patch.setattr(at_once, "_clip_own", whitened_later)


@mutant(killed_by=killers.a_gradient_of_two_groups, says=MOVED)
def groups_whitened_by_the_next(patch: pytest.MonkeyPatch) -> None:
    """The sum of each group's gradients is multiplied by the next group's matrix."""
    gradients = WhitenedRule.gradients

    def next_one(self: WhitenedRule, *args: Any, **kwargs: Any) -> Any:
        other = WhitenedRule.of(self.one, PublicMatrix(*(own.roll(1, 0) for own in self.matrix)))
        return gradients(other, *args, **kwargs)

    patch.setattr(WhitenedRule, "gradients", next_one)


@mutant(killed_by=killers.a_mean_in_single_precision, says="a plain mean was accepted")
def rounded_mean_whitened(patch: pytest.MonkeyPatch) -> None:
    """A plain mean's rounding, which depends on the private size of the batch, is scaled up."""
    patch.setattr(hooks, "rounded_options", lambda *args: None)
    patch.setattr(validation, "rounded_options", lambda *args: None)


@mutant(killed_by=killers.random_public_examples, says="have moved the noise")
def public_examples_of_the_noises_generator(patch: pytest.MonkeyPatch) -> None:
    """Random public examples come from the generator of the noise, and go on with it: a probe that
    seeds it makes all noise known."""
    patch.setattr(whitening, "repeatable", lambda *args: nullcontext())


@mutant(killed_by=killers.a_large_direction_reaches_the_limit, says="reaches only")
def measured_by_the_largest_eigenvalue(patch: pytest.MonkeyPatch) -> None:
    """The norm of a gradient at one position is bounded by the largest eigenvalue, which wastes
    most of the limit."""
    patch.setattr(WhitenedRule, "exact_bound", lambda self, *args: self.one.exact_bound(*args))


@mutant(killed_by=killers.state_that_evaluation_reads, says="reached the matrices")
def learnt_in_evaluation_mode(patch: pytest.MonkeyPatch) -> None:
    """The matrices are learnt by passes in evaluation mode, which may read what training passes
    have left of their examples."""
    patch.setattr(whitening, "_STATELESS", (nn.Module,))
