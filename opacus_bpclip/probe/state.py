"""Search for examples of one forward pass that influence a later one, through the model's state.

The runs of `Search` start with the model's own buffers, so that a counter of steps is not taken for
coupling. In training a forward pass goes on from what the pass before has left: in the next step,
or in the next physical batch of the same step. An example whose values are left there changes the
contributions of batches in which it is not, and no noise covers that.

So some passes over one batch are run, and then some over a second one, each going on from the
buffers of the pass before. With other values or fewer examples in the first batch, the passes over
the second must have the same outputs and the same gradients.

Many models only overwrite something in each pass, such as attention maps that are shown later. If
what a pass makes and leaves does not depend on the pass before, no earlier pass can reach a later
one, and few passes show it.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor

from opacus_bpclip.probe import problems
from opacus_bpclip.probe.batches import Batch
from opacus_bpclip.probe.buffers import Buffers, buffers_of, differing, persistent
from opacus_bpclip.probe.comparison import equal, partitions
from opacus_bpclip.probe.copies import Copy
from opacus_bpclip.probe.problems import Problem
from opacus_bpclip.probe.randomness import Steady, tolerated
from opacus_bpclip.probe.recording import Recording
from opacus_bpclip.probe.snapshots import Snapshot, alike, snapshot

# The passes over each of the two batches: a model may write only from its second pass on, and read
# only what the pass before the last has left.
PASSES = 3


class _Pass(NamedTuple):
    """What one pass has made, and all that the model holds after it."""

    made: list[Tensor]
    left: Snapshot

    @classmethod
    def of(cls, copy: Copy, run: Recording) -> _Pass:
        """Return the copy's last run."""
        return cls([*run.outputs, *run.gradients], snapshot(copy.model))

    def is_as(self, other: _Pass, tolerance: float) -> bool:
        """Return whether all outputs and gradients, and all that was left, are equal."""
        return equal(self.made, other.made, tolerance) and alike(self.left, other.left)


class _Trace(NamedTuple):
    """What the passes over the first batch have left, and what those over the second have made."""

    left: Buffers
    made: list[list[Tensor]]

    def makes_the_same(self, other: _Trace, tolerance: float) -> bool:
        """Return whether all outputs and gradients are equal."""
        return all(equal(*pair, tolerance) for pair in zip(self.made, other.made, strict=True))


def problem_of_state(copy: Copy, batch: Batch) -> Problem | None:
    """Return which state holds examples and reaches later passes or the ``state_dict``, if any.

    A model that changes no buffer and no attribute is run twice, and one that only overwrites them
    five times, or seven times if it is random.

    Args:
        copy: a copy of the model, inside its ``with`` statement.
        batch: two or more examples.

    Raises:
        Exception: whatever the model's own code raises.
    """
    steady = Steady()
    run = partial(copy.run, batch, steady, inside=False, plain=True)
    try:
        # Some models keep something only with gradients, or only in the backward pass.
        tried = run(gradients=True)
    except Exception:  # whatever the model's own code raises
        # It may have no gradient of an output that no loss uses.
        tried = run(carry=True)
    tolerance = tolerated(steady, copy.device)
    if not copy.writes():
        # What is kept in an object of an object, a class or a global shows in the next pass alone.
        again = run(carry=True)
        if equal(again.outputs, tried.outputs, tolerance):
            return None
    if not copy.written() & persistent(copy.model):
        start = _Pass.of(copy, tried)
        if _forgets(copy, batch, steady, {} if steady.random else {0: start}, tolerance):
            return None
    for mode, others in _other_first_batches(batch, steady):
        base = _trace(copy, batch, batch, mode)
        for first in others:
            trace = _trace(copy, first, batch, mode)
            # Batches of two sizes may differ by rounding errors.
            among = tolerance if first.size < batch.size else 0.0
            names = differing(base.left, trace.left, among)
            if not trace.makes_the_same(base, tolerance):
                if not _trace(copy, batch, batch, mode).makes_the_same(base, tolerance):
                    return Problem("(root)", problems.NOT_REPEATABLE)
                at = problems.owner(names[0]) if names else "(root)"
                return Problem(at, problems.carried(names))
            for name in names:
                if name in persistent(copy.model):
                    # The batches with other values come first.
                    text = problems.counted if first.size < batch.size else problems.buffered
                    return Problem(problems.owner(name), text(name))
    return None


def _forgets(
    copy: Copy, batch: Batch, steady: Steady, known: dict[int, _Pass], tolerance: float
) -> bool:
    """Return whether what a pass makes and leaves is the same after other batches before it.

    Args:
        copy: a copy of the model, which has just been run on the batch.
        batch: two or more examples.
        steady: the mode of that run.
        known: earlier passes over the batch, by the seed of their random numbers.
        tolerance: the largest relative difference at which outputs and gradients count as equal.
    """
    mode = None if steady.random else steady
    run = partial(copy.run, steady=mode, inside=False, plain=True, carry=True, gradients=True)

    rows, others = next(partitions(batch.size))
    firsts = batch.swapped(rows, seed=2), batch.swapped(others, seed=2).select(rows)
    for number, first in enumerate(firsts):
        seed = number if steady.random else 0
        if seed not in known:
            known[seed] = _Pass.of(copy, run(batch, seed=seed))
        run(first, seed=PASSES + number)
        if not _Pass.of(copy, run(batch, seed=seed)).is_as(known[seed], tolerance):
            return False
    return True


def _other_first_batches(batch: Batch, steady: Steady) -> list[tuple[Steady | None, list[Batch]]]:
    """Return batches with other values and with fewer examples, with the mode for random numbers.

    Equal random numbers might always keep a model from writing. Seeded ones do not, but fewer
    examples would get others.
    """
    halves = next(partitions(batch.size))
    swapped, fewer = [batch.swapped(rows, seed=2) for rows in halves], batch.select(halves[0])
    if not steady.random:
        return [(steady, [*swapped, fewer])]
    return [(None, swapped), (steady, [fewer])]


def _trace(copy: Copy, first: Batch, second: Batch, mode: Steady | None) -> _Trace:
    run = partial(copy.run, steady=mode, inside=False, plain=True, gradients=True)
    for number in range(PASSES):
        run(first, seed=number, carry=number > 0)
    left = buffers_of(copy.model, copied=True)
    made = []
    for number in range(PASSES):
        later = run(second, seed=PASSES + number, carry=True)
        made.append([*later.outputs, *later.gradients])
    return _Trace(left, made)
