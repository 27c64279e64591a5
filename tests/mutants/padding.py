"""Rows of padding that contribute, or count as examples."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from opacus_bpclip.clipping import scope
from opacus_bpclip.clipping.factors import Factors, clip_factors
from opacus_bpclip.clipping.node import NodeClip
from opacus_bpclip.guard.guard import GradientGuard
from opacus_bpclip.sampling.log import SampleLog
from tests.mutants import padding_killers as killers
from tests.mutants.registry import MOVED, mutant


@mutant(killed_by=killers.padding_against_an_example, says="joint" + MOVED)
def padding_not_masked(patch: pytest.MonkeyPatch) -> None:
    """Rows of padding get a factor like any other: an example in the place of such a row moves the
    sum by its own contribution and by the row's."""

    def unmasked(*args: Any, present: Tensor | None, **options: Any) -> Factors:
        return clip_factors(*args, **options)

    patch.setattr(scope, "clip_factors", unmasked)


@mutant(killed_by=killers.small_examples_among_padding, says="together and alone differ")
def mean_undone_by_the_items(patch: pytest.MonkeyPatch) -> None:
    """The layers undo a mean over the examples, where it was a mean over all rows: each
    contribution then depends on the number of examples."""

    def items(self: NodeClip, g: Tensor, graph: Any) -> int:
        present = self.budget.present
        return len(g) if present is None else int(present.sum())

    patch.setattr(NodeClip, "examples_of", items)


@mutant(killed_by=killers.padding_that_is_not_zero, says="nothing bounds was released")
def padding_taken_for_sampled(patch: pytest.MonkeyPatch) -> None:
    """The rows of padding are not compared with the sample: rows that are not zero any more, and so
    not masked, are trained on although they were not sampled."""
    enter_forward = GradientGuard.enter_forward

    def uncounted(self: GradientGuard, batch_size: int, present: Tensor | None = None) -> None:
        enter_forward(self, batch_size, None if present is None else present & False)

    patch.setattr(GradientGuard, "enter_forward", uncounted)


@mutant(killed_by=killers.padding_behind_another_sample, says="nothing bounds was released")
def any_sample_that_waits_taken(patch: pytest.MonkeyPatch) -> None:
    """A physical batch is compared with any sample that waits, and not with the one that it was
    announced for: a larger sample hides the rows of padding."""
    patch.setattr(SampleLog, "_is_at_hand", lambda *_: False)
