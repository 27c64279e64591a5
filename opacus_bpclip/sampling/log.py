"""Where a step's rows come from: one sampled batch or parts of it, each item one row, used once.

The accountant takes each step for a Poisson sample of its own. So the sampler numbers what it
draws (`opacus_bpclip.sampling.loader`), the guard says how many rows the gradients at hand are of,
and the optimizer says when a step ends. Rows carry no names: numbers of rows are compared.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opacus_bpclip.sampling import problems

# Batches that nobody trains on would pile up without end, as those of evaluation loops do.
_MOST_WAITING = 1024


@dataclass(eq=False)
class Pass:
    """One pass over the loader.

    Attributes:
        alive: whether it may still draw.
        left: whether somebody ended it before its last batch.
        used: how many steps or physical batches have trained on what it drew.
        ahead: how many physical batches were announced when the first of them was stepped on.
        part: the sample of which more parts are to be announced.
    """

    alive: bool = True
    left: bool = False
    used: int = 0
    ahead: int = 0
    part: Sample | None = None


@dataclass(eq=False)
class Sample:
    """One batch that the sampler drew.

    Attributes:
        items: how many items it has.
        of: the pass over the loader that drew it.
        rows: how many rows the step at hand has trained on.
        announced: whether a physical batch of it was announced.
    """

    items: int
    of: Pass
    rows: int = 0
    announced: bool = False


@dataclass(eq=False)
class Signal:
    """A physical batch that was announced.

    Attributes:
        skip: whether more parts of its logical batch follow.
        sample: what it is a part of, ``None`` where no private loader draws.
        thread: which thread announced it.
    """

    skip: bool
    sample: Sample | None
    thread: int

    @property
    def is_empty(self) -> bool:
        """Return whether it has no items."""
        return self.sample is not None and not self.sample.items


class SampleLog:
    """The sampled batches that wait for their step, and the one that a step is adding up.

    Attributes:
        attached: whether a private loader draws for this model. Without one, nothing is checked.
        is_padded: whether that fills physical batches up with rows that are no item's.
        last_step_skipped: whether the last step only collected a part of its batch.
        mixed: whether what was collected before must not be added to.
    """

    def __init__(self) -> None:
        self.attached = False
        self.is_padded = False
        self.last_step_skipped = False
        self.mixed = False
        self._passes: list[Pass] = []
        self._waiting: list[Sample] = []
        self._latest: Sample | None = None
        self._open: Sample | None = None  # what the step at hand adds up
        self._mark: Sample | None = None  # of what its parts were announced to be
        self._signals: deque[Signal] = deque()
        self._last: Signal | None = None  # the latest signal
        self._current: Signal | None = None  # the signal of the step at hand
        self._stepping = threading.get_ident()  # in which thread steps are taken
        self._left_out = False  # whether a physical batch was announced and not stepped on

    def __getstate__(self) -> dict[str, Any]:
        # What waits, waits for the original: a copy must not train on it, too.
        kept = ("attached", "is_padded", "last_step_skipped", "mixed", "_open", "_mark")
        return vars(SampleLog()) | {name: getattr(self, name) for name in kept}

    # Loader

    def begin(self) -> Pass:
        """Begin a pass over the loader.

        Forget what can only have been looked at: batches of finished passes without a step.
        """
        self._forget(lambda of: not of.alive and not of.left and not of.used)
        if self._last is not None and self._last.thread == self._stepping:
            # What somebody has left will not come any more. A pass that ended on its own had a step
            # for each physical batch, unless one was left out.
            over = [s for s in self._signals if s.sample is not None and not s.sample.of.alive]
            self._left_out |= any(
                s.sample and not s.sample.of.left and s.sample.items for s in over
            )
            self._signals = deque(s for s in self._signals if s not in over)
        begun = Pass()
        self._passes.append(begun)
        gone = [of for of in self._passes[:-2] if not of.alive]
        self._passes = [of for of in self._passes if of not in gone]
        self._forget(lambda of: of in gone and not of.left)
        return begun

    def end(self, of: Pass, *, left: bool) -> None:
        """Note that a pass over the loader has ended.

        Args:
            of: the pass.
            left: whether that was before its last batch.
        """
        of.alive, of.left = False, left

    def draw(self, items: int, of: Pass) -> None:
        """Note that a batch was drawn."""
        self._latest = Sample(items, of)
        self._waiting.append(self._latest)
        del self._waiting[:-_MOST_WAITING]

    def _forget(self, done: Callable[[Pass], bool]) -> None:
        self._waiting = [sample for sample in self._waiting if not done(sample.of)]
        self._signals = deque(s for s in self._signals if s.sample is None or not done(s.sample.of))

    def _forget_looks(self) -> None:
        """Forget what was announced by a pass that ended without a step, unless it is the last."""
        last = self._last.sample.of if self._last and self._last.sample else None
        self._signals = deque(
            s
            for s in self._signals
            if s.sample is None or s.sample.of is last or s.sample.of.alive or s.sample.of.used
        )

    # Physical batches

    def signal(self, skip: bool) -> None:
        """Announce a physical batch, a part of a sample.

        Args:
            skip: whether more parts of its logical batch follow.
        """
        self._last = Signal(skip, self._next_of(), threading.get_ident())
        self._signals.append(self._last)
        sample = self._last.sample
        if sample is not None:
            sample.announced = True
            sample.of.part = sample if skip else None

    def _next_of(self) -> Sample | None:
        """Return of which sample the next part is: of one just drawn, or of the one before."""
        latest = self._latest
        if latest is None or (latest.of.alive and not latest.announced):
            return latest
        # A pass in between, for evaluation, has drawn others, and has ended.
        unfinished = (of.part for of in reversed(self._passes) if of.alive and of.part)
        return next(unfinished, latest)

    def skips(self, *, pop: bool, rows: int | None = None) -> bool:
        """Return whether the step at hand is of a batch that has more parts.

        Args:
            pop: whether that step begins: the next one is of the next physical batch.
            rows: how many rows the gradients at hand are of, ``None`` if unknown.
        """
        self._stepping = threading.get_ident()
        if not pop:
            return bool(self._signals) and self._signals[0].skip
        self._forget_looks()
        # Users may take no step on a batch without items, unless it was filled up.
        while rows and not self.is_padded and len(self._signals) > 1 and self._signals[0].is_empty:
            self._signals.popleft()
        if self._signals:
            self._drop_left_out(self._signals[0])
        self._current = self._signals.popleft() if self._signals else None
        return self._current is not None and self._current.skip

    def _drop_left_out(self, first: Signal) -> None:
        """Find signals too many: each step has taken one, however far a reader is ahead."""
        if first.sample is None or first.thread != self._stepping:
            return  # A thread that reads ahead does so at its own pace.
        of, count = first.sample.of, len(self._signals)
        if not of.ahead:
            of.ahead = count
        while len(self._signals) > of.ahead:
            self._signals.popleft()
            self._left_out = True

    # Step

    def spend(self, rows: int | None) -> str | None:
        """Note that the step at hand adds up gradients of some rows; return why it must not.

        Args:
            rows: how many, ``None`` if unknown, as in a compiled graph.
        """
        if not self.attached:
            return None
        if self._left_out:
            self._left_out, self.mixed = False, True
            return problems.LEFT_OUT
        announced = self._current.sample if self._current else None
        mark = announced or self._next_of()
        if self._open is not None and mark is not self._mark:
            self.mixed = True
            return problems.TWO_SAMPLES
        self._mark = mark
        total = (rows or 0) + (self._open.rows if self._open else 0)
        sample = self._holding(total, rows is not None and self._open is None, announced)
        if sample is None:
            if rows == 0:
                return None  # An empty batch adds nothing, whoever made it.
            among = [announced] if self._is_at_hand(announced) else [self._open, *self._waiting]
            known = [s.items for s in among if s is not None]
            return problems.too_many(rows, total, known, padded=self.is_padded)
        self._take(sample, total)
        sample.of.used += 1
        return None

    def close(self) -> None:
        """End the step: nothing more is added to it, and its sample has been used."""
        self._open = self._mark = self._current = None
        self.mixed = False

    def _holding(self, rows: int, whole: bool, announced: Sample | None) -> Sample | None:
        """Return the sample that so many rows may be of; the open one where there is one."""
        if announced is not None and self._is_at_hand(announced):
            return announced if announced.items >= rows else None
        candidates = [*([self._open] if self._open else []), *self._waiting]
        fitting = [sample for sample in candidates if sample.items >= rows]
        if whole and announced is None:
            # Nobody split it up: a batch of just this size is likelier than a part of another.
            fitting.sort(key=lambda sample: sample.items != rows)
        return fitting[0] if fitting else None

    def _is_at_hand(self, sample: Sample | None) -> bool:
        """Return whether a sample may be trained on."""
        return sample is not None and sample in (self._open, *self._waiting)

    def _take(self, sample: Sample, rows: int) -> None:
        if sample is not self._open:
            self._waiting.remove(sample)
            if self._open is not None:  # With several waiting it was taken for another one.
                self._open.rows = 0
                self._waiting.insert(0, self._open)
        sample.rows = rows
        self._open = sample
