"""Search for examples of one forward pass that influence a later one, through the model's state.

The runs of `Search` start with the model's own buffers, so that a counter of steps is not taken for
coupling. In training a forward pass goes on from what the pass before has left: in the next step,
or in the next physical batch of the same step. An example whose values are left there changes the
contributions of batches in which it is not, and no noise covers that.

So some passes over one batch are run, and then some over a second one, each going on from the
buffers of the pass before. With other values or fewer examples in the first batch, the passes over
the second must have the same outputs and the same gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from opacus_bpclip.probe import problems
from opacus_bpclip.probe.batches import Batch
from opacus_bpclip.probe.buffers import Buffers, buffers_of, differing, persistent
from opacus_bpclip.probe.comparison import equal, partitions
from opacus_bpclip.probe.copies import Copy
from opacus_bpclip.probe.problems import Problem
from opacus_bpclip.probe.randomness import Steady, tolerated

# The passes over each of the two batches: a model may write only from its second pass on, and read
# only what the pass before the last has left.
PASSES = 3


class _Trace(NamedTuple):
    """What the passes over the first batch have left, and what those over the second have made."""

    left: Buffers
    made: list[list[Tensor]]


def problem_of_state(copy: Copy, batch: Batch) -> Problem | None:
    """Return which state holds examples and reaches later passes or the ``state_dict``, if any.

    A model that changes no buffer is run once.

    Args:
        copy: a copy of the model, inside its ``with`` statement.
        batch: two or more examples.

    Raises:
        Exception: whatever the model's own code raises.
    """
    steady = Steady()
    # With gradients, since some models keep nothing without.
    copy.run(batch, steady, inside=False, plain=True)
    if not copy.writes:
        return None
    base = _trace(copy, batch, batch, steady)
    tolerance = tolerated(steady, copy.device)
    for first in _other_first_batches(batch):
        trace = _trace(copy, first, batch, steady)
        names = differing(base.left, trace.left, tolerance)
        if not all(equal(*pair, tolerance) for pair in zip(base.made, trace.made, strict=True)):
            return Problem(_owner(names), problems.carried(names))
        for name in names:
            if name in persistent(copy.model):
                return Problem(problems.owner(name), problems.buffered(name))
    return None


def _owner(names: list[str]) -> str:
    return problems.owner(names[0]) if names else "(root)"


def _other_first_batches(batch: Batch) -> Iterator[Batch]:
    halves = next(partitions(batch.size))
    for rows in halves:
        yield batch.swapped(rows, seed=2)
    yield batch.select(halves[0])


def _trace(copy: Copy, first: Batch, second: Batch, steady: Steady) -> _Trace:
    for number in range(PASSES):
        copy.run(first, steady, inside=False, plain=True, carry=number > 0)
    left = buffers_of(copy.model, copied=True)
    made = []
    for _ in range(PASSES):
        run = copy.run(second, steady, inside=False, plain=True, carry=True, gradients=True)
        made.append([*run.outputs, *run.gradients])
    return _Trace(left, made)
