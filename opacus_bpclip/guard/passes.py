"""The backward passes of one step: of which forward passes, and of which sampled batch they are."""

from __future__ import annotations

import torch
from torch import Tensor

from opacus_bpclip.sampling.log import SampleLog

ACCUMULATION = (
    "Poisson sampling is not compatible with grad accumulation: two batches may share an example. "
    "Call optimizer.step() and zero_grad() after every backward pass, or use BatchMemoryManager."
)
TWO_FORWARDS = (
    "One backward pass came from two forward passes of the model (a siamese or triplet loss, "
    "R-Drop, a discriminator on real and generated examples): an example that is in both would "
    "contribute twice, and nothing shows which rows belong together. Put them in one call: give "
    "the model a forward that takes all inputs, runs its layers on each, and returns all outputs, "
    "and declare how often it uses each layer: BackpropClipping(uses={name: K})."
)

MIXED = (
    'allocation="joint" has one factor for all layers, but a part of the model is compiled and the '
    "rest is not. Compile the whole model, or none of it, or use "
    'BackpropClipping(allocation="dimension").'
)


class BackwardPasses:
    """What the gradients at hand came from.

    Attributes:
        samples: the batches that the private loader has drawn.
        accumulation_allowed: whether several backward passes may add up before one step.
        collected: how many of them have brought gradients.
    """

    def __init__(self) -> None:
        self.samples = SampleLog()
        self.accumulation_allowed = True
        self.collected = 0
        self._forwards: dict[int, int | Tensor] = {}  # with how many rows each
        self._task = -1
        self._traced_task: int | None = None  # of gradients that compiled graphs have sent
        self._traced_rows: Tensor | None = None

    def begin(self, forward: int, rows: int | Tensor) -> str | None:
        """Note that a backward pass reached a layer; return why it must not.

        Args:
            forward: the number of the forward pass that it goes back through.
            rows: how many examples that one was over; a tensor is read when the step is taken.
        """
        if forward in self._forwards:
            return None
        task = torch._C._current_graph_task_id()
        if self._forwards and task == self._task:
            return TWO_FORWARDS
        earlier = self._forwards or self._traced_task not in (None, task)
        if earlier and not self.accumulation_allowed:
            return ACCUMULATION
        self._forwards[forward] = rows
        self._task = task
        return None

    def note_traced(self) -> str | None:
        """Note that a compiled graph has sent a gradient; return why it must not."""
        task = torch._C._current_graph_task_id()
        if not self.accumulation_allowed:
            earlier = self._forwards and self._task != task
            if earlier or self._traced_task not in (None, task):
                return ACCUMULATION
        self._traced_task = task
        return None

    def note_rows(self, rows: Tensor) -> None:
        """Note how many rows a compiled graph took for examples; a scalar tensor."""
        # What each layer has counted is of the same forward pass.
        known = self._traced_rows
        self._traced_rows = rows if known is None else torch.maximum(known, rows)

    @property
    def is_mixed(self) -> bool:
        """Return whether a backward pass goes through compiled graphs and eager layers."""
        return bool(self._forwards) and self._traced_task == self._task

    @property
    def count(self) -> int:
        """Return from how many forward passes the gradients at hand came."""
        return len(self._forwards)

    @property
    def rows(self) -> int | None:
        """Return how many rows the gradients at hand are of, ``None`` if that was not counted."""
        if self._forwards:
            return sum(map(int, self._forwards.values()))
        return None if self._traced_rows is None else int(self._traced_rows)

    def skips(self, *, pop: bool) -> bool:
        """Return whether the step at hand is of a batch that has more parts.

        Args:
            pop: whether that step begins.
        """
        return self.samples.skips(pop=pop, rows=self.rows)

    def collect(self, *, any_gradient: bool) -> str | None:
        """Note that the gradients at hand go into the step; return why they must not.

        Args:
            any_gradient: whether there are any.
        """
        if not any_gradient:
            return None
        # Of what a compiled graph made the rows are counted only where batches are filled up.
        return self.samples.spend(self.rows)

    def clear(self) -> None:
        """Forget them: they have been collected or thrown away."""
        self._forwards.clear()
        self._traced_task = self._traced_rows = None
        self.collected = 0
