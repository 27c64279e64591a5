"""Steps on other rows than one sampled batch, one row for each item."""

from __future__ import annotations

import pytest

from opacus_bpclip.clipping.alignment import Alignment
from opacus_bpclip.guard.ranks import Ranks
from opacus_bpclip.sampling import collating, items
from opacus_bpclip.sampling.log import SampleLog
from opacus_bpclip.sampling.records import Sample, Signal
from tests.mutants import sampling_killers as killers
from tests.mutants.registry import mutant

RELEASED = "nothing bounds was released"


@mutant(killed_by=killers.more_rows_than_items, says=RELEASED)
def rows_not_counted(patch: pytest.MonkeyPatch) -> None:
    """Any number of rows is accepted for a sampled batch: three crops of each item move the sum by
    three times the claimed sensitivity."""

    def any_sample(self: SampleLog, rows: int, whole: bool, announced: object) -> Sample | None:
        return next(iter([*([self._open] if self._open else []), *self._waiting]), None)

    patch.setattr(SampleLog, "_holding", any_sample)


@mutant(killed_by=killers.batch_used_twice, says=RELEASED)
def samples_stay_in_the_log(patch: pytest.MonkeyPatch) -> None:
    """A sample is not marked as used by a step: ten steps on one batch are accounted as ten
    samples."""
    take = SampleLog._take

    def keep(self: SampleLog, sample: Sample, rows: int) -> None:
        take(self, sample, rows)
        self._waiting.append(Sample(sample.items, sample.of))

    patch.setattr(SampleLog, "_take", keep)


@mutant(killed_by=killers.two_samples_in_one_step, says=RELEASED)
def samples_added_up(patch: pytest.MonkeyPatch) -> None:
    """A step may add up parts of several samples: an example that is in two contributes twice."""
    spend = SampleLog.spend

    def forgetful(self: SampleLog, rows: int | None) -> str | None:
        self._mark = (self._current and self._current.sample) or self._next_of()
        return spend(self, rows)

    patch.setattr(SampleLog, "spend", forgetful)


@mutant(killed_by=killers.part_without_announcement, says=RELEASED)
def parts_not_announced(patch: pytest.MonkeyPatch) -> None:
    """A batch that nothing announces is added to the sample that the step has begun, though it may
    be of another pass: an example that is in both contributes twice."""
    spend = SampleLog.spend

    def trusting(self: SampleLog, rows: int | None) -> str | None:
        if self._mark is not None and self._current is None:
            self._current = Signal(False, self._mark, self._stepping)
        return spend(self, rows)

    patch.setattr(SampleLog, "spend", trusting)


@mutant(killed_by=killers.two_open_iterators, says=RELEASED)
def open_iterators_not_told_apart(patch: pytest.MonkeyPatch) -> None:
    """A step takes the oldest announcement of all passes over the loader: an iterator that was only
    looked at shifts those of the training loop, so that steps add up parts of two samples."""
    patch.setattr(SampleLog, "_abandon_if_ambiguous", lambda _: None)


@mutant(killed_by=killers.group_of_two_ranks, says=RELEASED)
def ranks_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    """A process group that is created after `make_private` is not noticed: its ranks train
    separately, each with its own samples and noise, and the accountant counts one of them."""
    patch.setattr(Ranks, "problem", lambda _: None)


@mutant(killed_by=killers.scale_of_another_axis, says=RELEASED)
def broadcast_axes_not_compared(patch: pytest.MonkeyPatch) -> None:
    """The operands of a broadcast parameter are not checked: with wrong `dims`, one example's copy
    gets the gradient of others."""
    patch.setattr(Alignment, "_check", lambda *_: None)


@mutant(killed_by=killers.all_items_in_one_row, says="was accepted")
def packed_rows_accepted(patch: pytest.MonkeyPatch) -> None:
    """A collate function may put all items into one row, which then counts as one example."""
    patch.setattr(collating, "_joined", lambda one, other: False)


@mutant(killed_by=killers.rows_of_the_whole_batch, says="was accepted")
def rows_of_other_items_accepted(patch: pytest.MonkeyPatch) -> None:
    """A collate function may standardise a batch by its own mean and deviation: one item changes
    the rows of all others."""
    patch.setattr(collating, "_coupled_rows", lambda loader, axis: None)


@mutant(killed_by=killers.one_item_ten_times, says="was accepted")
def repeated_items_accepted(patch: pytest.MonkeyPatch) -> None:
    """A data set may name an item ten times, and each copy is sampled and clipped by itself."""
    patch.setattr(items, "count_of_repeats", lambda dataset: 0)
