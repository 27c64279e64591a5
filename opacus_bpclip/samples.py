"""Where a step's rows come from: one sampled batch or parts of it, each item one row, used once.

The accountant takes each step for a Poisson sample of its own. So the sampler numbers what it
draws (`opacus_bpclip.loader`), the guard says how many rows a backward pass has trained on, and the
optimizer says when a step ends. Rows carry no names: what is compared are numbers of rows.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(eq=False)
class Sample:
    """One batch that the sampler drew.

    Attributes:
        items: how many items it has.
        iteration: the number of the pass over the loader that drew it.
        rows: how many rows the step at hand has trained on.
    """

    items: int
    iteration: int
    rows: int = 0


class SampleLog:
    """The sampled batches that wait for their step, and the one that a step is adding up.

    Attributes:
        attached: whether a private loader draws for this model. Without one, nothing is checked.
        last_step_skipped: whether the last step only collected a part of its batch.
        mixed: whether the gradients at hand are of another sample than what was collected before.
    """

    def __init__(self) -> None:
        self.attached = False
        self.last_step_skipped = False
        self.mixed = False
        self._iterations = 0
        self._left: set[int] = set()  # iterations that somebody ended early
        self._waiting: list[Sample] = []
        self._latest: Sample | None = None
        self._open: Sample | None = None  # what the step at hand adds up
        self._open_mark: Sample | None = None  # the latest sample when it did so first
        self._uncollected = 0  # rows of the open sample whose gradients the optimizer has not taken
        self._signals: deque[tuple[bool, Sample | None]] = deque()

    # Loader

    def begin(self) -> int:
        """Begin a pass over the loader; return its number.

        Samples of passes before the previous one will not be trained on any more. Neither will
        physical batches that were announced by a pass that somebody has left.
        """
        self._iterations += 1
        self._waiting = [s for s in self._waiting if s.iteration >= self._iterations - 1]
        self._signals = deque(
            (skip, sample)
            for skip, sample in self._signals
            if sample is None or sample.iteration not in self._left
        )
        self._left.clear()
        return self._iterations

    def leave(self, iteration: int) -> None:
        """Note that a pass over the loader was ended before its last batch."""
        self._left.add(iteration)

    def draw(self, items: int, iteration: int) -> None:
        """Note that a batch was drawn."""
        self._latest = Sample(items, iteration)
        self._waiting.append(self._latest)

    # Physical batches

    def signal(self, skip: bool) -> None:
        """Announce a physical batch, a part of the sample that was drawn last.

        Args:
            skip: whether more parts of its logical batch follow.
        """
        self._signals.append((skip, self._latest))

    def skips(self, *, pop: bool) -> bool:
        """Return whether the step at hand is of a batch that has more parts.

        Args:
            pop: whether to go on to the next physical batch.
        """
        if not self._signals:
            return False
        skip, _ = self._signals.popleft() if pop else self._signals[0]
        return skip

    # Backward pass and step

    def spend(self, rows: int | None) -> str | None:
        """Note that a backward pass trains on some rows; return what is wrong with that.

        Args:
            rows: how many, ``None`` if unknown, as in a compiled graph.
        """
        if not self.attached:
            return None
        announced = self._signals[0][1] if self._signals else None
        if self._open is not None:
            if (announced or self._latest) is not self._open_mark:
                self.mixed = True
                return _TWO_SAMPLES
        else:
            self._open_mark = announced or self._latest
        total = (rows or 0) + (self._open.rows if self._open else 0)
        sample = self._holding(total, rows is not None and self._open is None, announced)
        if sample is None:
            # An empty batch adds nothing, whoever made it.
            return None if rows == 0 else self._too_many(total)
        self._take(sample, total)
        self._uncollected += rows or 0
        return None

    def collect(self) -> None:
        """Note that the optimizer has taken the gradients at hand."""
        self._uncollected = 0

    def discard(self) -> None:
        """Note that the gradients at hand were thrown away: their rows may be trained on again."""
        if self._open is None or not self._uncollected:
            return
        self._open.rows -= self._uncollected
        self._uncollected = 0
        if not self._open.rows:
            self._waiting.insert(0, self._open)
            self._open = self._open_mark = None

    def close(self) -> None:
        """End the step: nothing more is added to it, and its sample has been used."""
        self._open = self._open_mark = None
        self._uncollected = 0
        self.mixed = False

    def _holding(self, rows: int, whole: bool, announced: Sample | None) -> Sample | None:
        """Return the sample that so many rows may be of; the open one where there is one."""
        candidates = [self._open] if self._open else []
        if announced in self._waiting:
            candidates.append(announced)
        candidates += self._waiting
        fitting = [sample for sample in candidates if sample.items >= rows]
        if whole and announced is None:
            # Nobody split it up: a batch of just this size is likelier than a part of another.
            fitting.sort(key=lambda sample: sample.items != rows)
        return fitting[0] if fitting else None

    def _take(self, sample: Sample, rows: int) -> None:
        if sample is not self._open:
            self._waiting.remove(sample)
            if self._open is not None:  # With several waiting it was taken for another one.
                self._open.rows = 0
                self._waiting.insert(0, self._open)
        sample.rows = rows
        self._open = sample

    def _too_many(self, rows: int) -> str:
        known = [sample.items for sample in (self._open, *self._waiting) if sample is not None]
        if not known:
            return (
                f"The model trains on a batch{f' of {rows} rows' * bool(rows)}, but the data "
                "loader that make_private returned has drawn none that was not used yet: the batch "
                "came from elsewhere, or it is used a second time. The accountant takes "
                "each step for a Poisson sample of its own, drawn by that loader. Iterate over the "
                "loader that make_private returned for this model, and take one step for each of "
                "its batches. If two models train on the same batches, put both in one module "
                "whose forward runs them, with one optimizer over both."
            )
        return (
            f"The model trains on a batch of {rows} rows, but the data loader sampled "
            f"{max(known)} items: an item has several rows, or some rows are of no item (crops, "
            "augmented copies, generated examples). The bound holds for one row of each item; an "
            "item with several rows contributes several times as much. Make one row of each item "
            "in the dataset or collate_fn, and train on nothing but the loader's batch."
        )


_TWO_SAMPLES = (
    "One step would add up two sampled batches, which may share an example: it would contribute "
    "twice. A step is of one batch of the loader that make_private returned, or of all its parts. "
    "Do not signal_skip_step over several batches, and finish a logical batch before leaving "
    "BatchMemoryManager's loop (zero_grad() throws away what an unfinished one has collected, "
    "after this error). For larger batches, make the loader's batch_size larger."
)
