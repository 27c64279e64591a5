"""Trial runs that do not find what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from opacus_bpclip.probe import copies, prober, ragged, state, values
from opacus_bpclip.probe.batches import Batch
from opacus_bpclip.probe.randomness import Steady
from tests.mutants import probe_killers
from tests.mutants.registry import mutant


@mutant(killed_by=probe_killers.mean_over_labels_that_count, says="was not found")
def labels_all_count(patch: pytest.MonkeyPatch) -> None:
    """Made-up labels ignore no position: a loss that divides by the number of labels that count
    looks like a mean over the examples."""
    patch.setattr(ragged, "padded", lambda batch: None)


@mutant(killed_by=probe_killers.mean_over_labels_that_count, says="was not found")
def examples_equally_long(patch: pytest.MonkeyPatch) -> None:
    """Each made-up example ignores the same number of positions."""

    def halves(leaf: Tensor, axis: int) -> Tensor:
        length = leaf.shape[-1]
        return torch.arange(length) < length // 2

    patch.setattr(ragged, "kept_positions", halves)


@mutant(killed_by=probe_killers.mean_weighted_by_class, says="was not found")
def classes_halved_evenly(patch: pytest.MonkeyPatch) -> None:
    """Both halves of the made-up examples have equally many labels of each class, so the sum of the
    class weights is the same in both."""
    drawn = values._drawn

    def even(shape: tuple[int, ...], like: Tensor, *rest: Any) -> Tensor:
        if like.is_floating_point():
            return drawn(shape, like, *rest)
        flags = torch.tensor([1, 0, 0, 1]).view(-1, *[1] * (len(shape) - 1))
        return flags.expand(shape).to(like)

    patch.setattr(values, "_drawn", even)


@mutant(killed_by=probe_killers.module_under_two_names, says="was left changed")
def substitutes_stay(patch: pytest.MonkeyPatch) -> None:
    """The model keeps the copies of the trial runs, in double precision, and trains those, which
    are not watched."""
    patch.setattr(copies.Substitutes, "__exit__", lambda self, *error: None)


@mutant(killed_by=probe_killers.mean_of_the_batch_before, says="was not found")
def buffers_put_back_before_each_pass(patch: pytest.MonkeyPatch) -> None:
    """Every trial run starts with the model's own buffers: what a buffer carries from one batch to
    the next, persistent or not, is never seen."""
    begin = copies.Substitutes.begin_run

    def put_back(self: copies.Substitutes, *, carry: bool = False) -> None:
        begin(self, carry=False)

    patch.setattr(copies.Substitutes, "begin_run", put_back)


@mutant(killed_by=probe_killers.memory_in_the_gradient, says="was not found")
def gradients_of_later_passes_not_compared(patch: pytest.MonkeyPatch) -> None:
    """Of the passes after other batches only the outputs are compared, and not the gradients."""
    patch.setattr(copies, "gradients_of", lambda output, parameters: [])


@mutant(killed_by=probe_killers.number_of_the_batch_before, says="was not found")
def earlier_batches_equally_large(patch: pytest.MonkeyPatch) -> None:
    """The batches before have other values and never another number of examples, which is private,
    too."""
    others = state._other_first_batches

    def equally_large(batch: Batch, steady: Steady) -> list[tuple[Steady | None, list[Batch]]]:
        return [
            (mode, [first for first in firsts if first.size == batch.size])
            for mode, firsts in others(batch, steady)
        ]

    patch.setattr(state, "_other_first_batches", equally_large)


@mutant(killed_by=probe_killers.average_read_from_the_sixth_pass_on, says="was not found")
def what_passes_leave_not_compared(patch: pytest.MonkeyPatch) -> None:
    """A model is taken to forget each batch if few passes have equal outputs and gradients, though
    they leave something else in its buffers."""
    patch.setattr(state, "alike", lambda one, other: True)


@mutant(killed_by=probe_killers.mean_kept_out_of_sight, says="was not found")
def state_out_of_sight_not_asked_for(patch: pytest.MonkeyPatch) -> None:
    """A model is taken to have no state if none of its buffers and attributes changes, though the
    next pass has other outputs."""
    patch.setattr(state, "equal", lambda one, other, tolerance=0.0: True)


@mutant(killed_by=probe_killers.mean_over_padding, says="was not found")
def padding_not_tried(patch: pytest.MonkeyPatch) -> None:
    """No item is tried beside a longer one, which decides how far it is padded."""
    patch.setattr(prober, "problem_of_padding", lambda *args, **options: None)
