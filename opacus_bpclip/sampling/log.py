"""The log that checks each step's rows: they must be one sample's, one for each item, used once.

The accountant counts each step as a Poisson sample of its own. So the sampler logs each batch that
it draws (`opacus_bpclip.sampling.loader`), the guard reports how many rows the current gradients
are from, and the optimizer reports when a step ends. Rows cannot be told apart, so only their
numbers are compared.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from opacus_bpclip.sampling import problems
from opacus_bpclip.sampling.records import Pass, Sample, Signal

# Batches that are never trained on, such as those of evaluation loops, are forgotten beyond this.
_MOST_WAITING = 2**16


class SampleLog:
    """The samples that wait for their step, and the one that the current step adds up.

    Attributes:
        attached: whether a private loader draws for this model. Without one, nothing is checked.
        is_padded: whether the loader pads physical batches with rows of zeros.
        last_step_skipped: whether the last step only collected a physical batch.
        mixed: whether the current batch was refused as another sample's than the sums collected
            before.
    """

    def __init__(self) -> None:
        self.attached = False
        self.is_padded = False
        self.last_step_skipped = False
        self.mixed = False
        self._passes: list[Pass] = []
        self._waiting: list[Sample] = []
        self._reader: Pass | None = None  # of the pass that begins next
        self._read_last: Pass | None = None  # the pass that the loop took its latest batch from
        self._latest: Sample | None = None
        self._open: Sample | None = None  # the sample that the current step adds up
        self._mark: Sample | None = None  # the sample that its parts were announced for
        self._signals: deque[Signal] = deque()
        self._last: Signal | None = None  # the latest signal
        self._current: Signal | None = None  # the signal of the current step
        self._stepping = threading.get_ident()  # the thread that takes the steps
        self._refusal: str | None = None  # why the next step is refused whatever its rows are

    def __getstate__(self) -> dict[str, Any]:
        # Waiting samples are the original's: a copy must not train on them a second time.
        kept = ("attached", "is_padded", "last_step_skipped", "mixed", "_open", "_mark")
        return vars(SampleLog()) | {name: getattr(self, name) for name in kept}

    # Loader

    def begin(self) -> Pass:
        """Begin a pass over the loader.

        Samples of finished passes without a step are forgotten: they were not trained on.
        """
        self._forget(lambda of: of.is_over and not of.left and not of.used)
        if self._last is not None and self._last.thread == self._stepping:
            # Batches of a pass that the loop has left will not come any more. In a pass that went
            # on to its end, a signal without a step means that a physical batch was left out.
            over = [s for s in self._signals if s.sample is not None and s.sample.of.is_over]
            if any(s.sample and s.sample.of.is_owed_steps and s.sample.items for s in over):
                self._refusal = problems.LEFT_OUT
            self._signals = deque(s for s in self._signals if s not in over)
        begun = self._reader or Pass()
        self._reader = None
        begun.beside = [of for of in self._passes if not of.is_over]
        self._passes.append(begun)
        gone = [of for of in self._passes[:-2] if of.is_over]
        self._passes = [of for of in self._passes if of not in gone]
        self._forget(lambda of: of in gone and not of.left)
        return begun

    def announce(self, reader: Pass) -> None:
        """Say who reads the pass that begins next."""
        self._reader = reader

    def hand_over(self, of: Pass) -> None:
        """Note that the user's loop is given a batch of a pass."""
        self._read_last = of

    def end(self, of: Pass, *, left: bool) -> None:
        """End a pass over the loader.

        Args:
            of: the pass.
            left: whether it ended before its last batch.
        """
        of.alive, of.left = False, of.left or left

    def draw(self, items: int, of: Pass) -> None:
        """Log a sample that was drawn."""
        self._latest = Sample(items, of)
        self._waiting.append(self._latest)
        del self._waiting[:-_MOST_WAITING]

    def _forget(self, done: Callable[[Pass], bool]) -> None:
        self._waiting = [sample for sample in self._waiting if not done(sample.of)]
        self._signals = deque(s for s in self._signals if s.sample is None or not done(s.sample.of))

    def _forget_looks(self) -> None:
        """Forget the signals of passes that ended without a step, except the pass read last."""

        def may_come(of: Pass) -> bool:
            return bool(not of.is_over or of.used or of is self._read_last)

        self._signals = deque(s for s in self._signals if s.sample is None or may_come(s.sample.of))

    # Physical batches

    def signal(self, skip: bool, of: Pass | None = None) -> None:
        """Announce a physical batch.

        Args:
            skip: whether more physical batches of its logical batch follow.
            of: the pass that it comes from; ``None`` if unknown, as with `BatchMemoryManager`.
        """
        begun = [sample.of for sample in self._unfinished() if not sample.of.is_abandoned]
        if of is None and len(begun) > 1 and begun[0].ahead:
            # It may be of any of them. An evaluation inside training, in contrast, has no step.
            self._abandon(begun)
        part = of.part if of is not None else None
        self._last = Signal(skip, part or self._next_of(), threading.get_ident())
        self._signals.append(self._last)
        sample = self._last.sample
        if sample is not None:
            sample.announced = True
            sample.of.part = sample if skip else None
            if sample.of.read is None:
                self.hand_over(sample.of)  # nobody else says so

    def _next_of(self) -> Sample | None:
        """Return the sample that the next physical batch is a part of."""
        return next(iter(self._unfinished()), self._latest)

    def _unfinished(self) -> Sequence[Sample]:
        """Return the samples that it may be a further part of, of the latest pass first."""
        latest = self._latest
        if latest is None or (latest.of.alive and not latest.announced):
            return ()
        # An evaluation pass may have drawn later samples and ended in between.
        found = [of.part for of in reversed(self._passes) if of.alive and of.part]
        return sorted(found, key=lambda sample: sample.of.is_abandoned)

    def skips(self, *, pop: bool, rows: int | None = None) -> bool:
        """Return whether more physical batches follow the one of the current step.

        Args:
            pop: whether the step begins with this call, which takes its signal.
            rows: how many rows the current gradients are from, ``None`` if unknown.
        """
        self._stepping = threading.get_ident()
        if not pop:
            return bool(self._signals) and self._signals[0].skip
        self._forget_looks()
        # Loops may leave out the step of an empty batch, unless it was padded.
        while rows and not self.is_padded and len(self._signals) > 1 and self._signals[0].is_empty:
            self._signals.popleft()
        self._abandon_if_ambiguous()
        if self._signals:
            self._drop_left_out(self._signals[0])
        self._current = self._signals.popleft() if self._signals else None
        if self._current and self._current.sample and self._current.sample.of.is_abandoned:
            self._refusal = problems.SEVERAL_ITERATORS
        return self._current is not None and self._current.skip

    def _abandon_if_ambiguous(self) -> None:
        """Refuse the step if its batch may be of either of two passes, both for good.

        Whichever was read last, the batch at hand may be the other's: read first, stepped on later.
        After a wrong guess, each later batch would count as a part of the sample before its own.
        """
        waiting = {signal.sample.of for signal in self._signals if signal.sample}
        if all(waiting.isdisjoint(of.beside) for of in waiting):
            return  # One pass, or passes of which each began after the other's end.
        self._abandon(waiting)
        self._refusal = problems.SEVERAL_ITERATORS

    def _abandon(self, passes: Iterable[Pass]) -> None:
        for of in passes:
            of.is_abandoned = True
        self._forget(lambda of: of.is_abandoned)

    def _drop_left_out(self, first: Signal) -> None:
        """Find signals without a step: the number of waiting signals must not grow in a pass."""
        if first.sample is None or first.thread != self._stepping:
            return  # A thread that reads ahead may be any number of signals ahead.
        of = first.sample.of
        own = [signal for signal in self._signals if signal.sample and signal.sample.of is of]
        if not of.ahead:
            of.ahead = len(own)
        for signal in own[: max(0, len(own) - of.ahead)]:
            self._signals.remove(signal)
            self._refusal = problems.LEFT_OUT

    # Step

    def spend(self, rows: int | None) -> str | None:
        """Add rows to the current step; return why that is refused, if it is.

        Args:
            rows: the number of rows, ``None`` if unknown, as in a compiled graph.
        """
        if not self.attached:
            return None
        refusal = self.refusal()
        if refusal is not None:
            return refusal
        announced = self._current.sample if self._current else None
        mark = announced or self._next_of()
        # Further parts of a sample are announced, too: without that, the batch is another's, from a
        # pass that was left, whose announcements are forgotten.
        if self._open is not None and (mark is not self._mark or self._current is None):
            self.mixed = True
            return problems.TWO_SAMPLES
        self._mark = mark
        total = (rows or 0) + (self._open.rows if self._open else 0)
        sample = self._holding(total, rows is not None and self._open is None, announced)
        if sample is None:
            if rows == 0:
                return None  # An empty batch adds nothing, wherever it came from.
            among = [announced] if self._is_at_hand(announced) else [self._open, *self._waiting]
            known = [s.items for s in among if s is not None]
            return problems.too_many(rows, total, known, padded=self.is_padded)
        self._take(sample, total)
        sample.of.used += 1
        return None

    def refusal(self) -> str | None:
        """Return why the step is refused whatever its rows are, if it is; say so once."""
        if not self.attached or self._refusal is None:
            return None
        refusal, self._refusal, self.mixed = self._refusal, None, True
        return refusal

    def close(self) -> None:
        """End the step; its sample has been used."""
        self._open = self._mark = self._current = None
        self.mixed = False

    def _holding(self, rows: int, whole: bool, announced: Sample | None) -> Sample | None:
        """Return a sample that may have this many rows; the current step's, if it has one."""
        if announced is not None and self._is_at_hand(announced):
            return announced if announced.items >= rows else None
        candidates = [*([self._open] if self._open else []), *self._waiting]
        fitting = [sample for sample in candidates if sample.items >= rows]
        if whole and announced is None:
            # Without signals a batch is more likely a whole sample than a part of a larger one.
            fitting.sort(key=lambda sample: sample.items != rows)
        return fitting[0] if fitting else None

    def _is_at_hand(self, sample: Sample | None) -> bool:
        """Return whether a sample waits for its step or is the current step's."""
        return sample is not None and sample in (self._open, *self._waiting)

    def _take(self, sample: Sample, rows: int) -> None:
        if sample is not self._open:
            self._waiting.remove(sample)
            if self._open is not None:  # The first rows were assigned to too small a sample.
                self._open.rows = 0
                self._waiting.insert(0, self._open)
        sample.rows = rows
        self._open = sample
