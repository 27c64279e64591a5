"""The backward passes of one step: from which forward passes and which sampled batch they come."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from opacus_bpclip.guard.call_checks import used_too_often
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.sampling.log import SampleLog

ACCUMULATION = (
    "Poisson sampling is not compatible with grad accumulation: two batches may share an example. "
    "Call optimizer.step() and zero_grad() after every backward pass, or use BatchMemoryManager."
)
TWO_FORWARDS = (
    "One backward pass came from two forward passes of the model (a siamese or triplet loss, "
    "R-Drop, a discriminator on real and generated examples): an example that is in both would "
    "contribute twice, and it is unknown which rows belong together. Put them in one call: give "
    "the model a forward that takes all inputs, runs its layers on each, and returns all outputs, "
    "and declare how often it uses each layer: BackpropClipping(uses={name: K})."
)

MIXED = (
    'allocation="joint" has one factor for all layers, but a part of the model is compiled and the '
    "rest is not. Compile the whole model, or none of it, or use "
    'BackpropClipping(allocation="dimension").'
)


class BackwardPasses:
    """The backward passes that the current gradients came from.

    Attributes:
        samples: the log of the batches that the private loader has drawn.
        accumulation_allowed: whether several backward passes may add up before one step.
        collected: how many backward passes have brought gradients.
    """

    def __init__(self) -> None:
        self.samples = SampleLog()
        self.accumulation_allowed = True
        self.collected = 0
        self._forwards: dict[int, int | Tensor] = {}  # number of each forward pass: its rows
        self._task = -1  # autograd's number of the latest backward pass through eager layers
        self._traced_task: int | None = None  # the same, through compiled graphs
        self._traced_forward: int | None = None  # the same, through traced forward passes
        self._traced_rows: Tensor | None = None
        self._calls: Mapping[str, int] = {}  # of eager layers, in the latest backward pass
        # The uses of layers in graphs that the latest backward pass went through, and that pass.
        self._traced_uses: list[tuple[Layer, int]] = []
        self._uses_task = -1

    def begin(
        self, forward: int, rows: int | Tensor, calls: Mapping[str, int] | None = None
    ) -> str | None:
        """Record that a backward pass reached a layer; return why it is refused, if it is.

        Args:
            forward: the number of the forward pass that it belongs to.
            rows: that pass's number of examples; a tensor is read only when the step is taken.
            calls: how often it has called each layer in eager mode.
        """
        if forward in self._forwards:
            return None
        task = torch._C._current_graph_task_id()
        if task == self._traced_forward or (self._forwards and task == self._task):
            return TWO_FORWARDS
        earlier = self._forwards or self._traced_task not in (None, task)
        if earlier and not self.accumulation_allowed:
            return ACCUMULATION
        self._forwards[forward] = rows
        self._task = task
        self._calls = calls or {}
        return self._used_too_often(task)

    def note_traced_uses(self, layer: Layer, count: int) -> str | None:
        """Record how often graphs have used a layer in the current backward pass.

        Returns:
            Why this is refused, if it is: eager uses in the same forward pass count, too.
        """
        task = torch._C._current_graph_task_id()
        if task != self._uses_task:
            self._traced_uses, self._uses_task = [], task
        self._traced_uses.append((layer, count))
        return self._used_too_often(task)

    def _used_too_often(self, task: int) -> str | None:
        if task != self._uses_task:
            return None
        calls = self._calls if task == self._task else {}
        for layer, count in self._traced_uses:
            if count + calls.get(layer.name, 0) > layer.uses:
                return used_too_often(layer)
        return None

    def begin_traced(self, forwards: int) -> str | None:
        """Note that a backward pass came through forward passes that were traced as a whole.

        Args:
            forwards: how many.

        Returns:
            Why it must not.
        """
        self._traced_forward = task = torch._C._current_graph_task_id()
        if forwards > 1 or (self._forwards and task == self._task):
            return TWO_FORWARDS
        return None

    def note_traced(self) -> str | None:
        """Record a gradient from a compiled graph; return why it is refused, if it is."""
        task = torch._C._current_graph_task_id()
        if not self.accumulation_allowed:
            earlier = self._forwards and self._task != task
            if earlier or self._traced_task not in (None, task):
                return ACCUMULATION
        self._traced_task = task
        return None

    def note_rows(self, rows: Tensor) -> None:
        """Record how many rows a traced forward pass counted as examples; a scalar tensor."""
        self._traced_rows = rows if self._traced_rows is None else self._traced_rows + rows

    @property
    def is_mixed(self) -> bool:
        """Return whether one backward pass goes through compiled graphs and eager layers."""
        return bool(self._forwards) and self._traced_task == self._task

    @property
    def count(self) -> int:
        """Return from how many forward passes the current gradients came."""
        return len(self._forwards)

    @property
    def rows(self) -> int | None:
        """Return how many rows the current gradients are from, ``None`` if that was not counted."""
        known = [*self._forwards.values()]
        if self._traced_rows is not None:
            known.append(self._traced_rows)
        return sum(map(int, known)) if known else None

    def skips(self, *, pop: bool) -> bool:
        """Return whether more physical batches of the current logical batch follow.

        Args:
            pop: whether a step begins with this call.
        """
        return self.samples.skips(pop=pop, rows=self.rows)

    def collect(self, *, any_gradient: bool) -> str | None:
        """Add the current gradients to the step; return why that is refused, if it is.

        Args:
            any_gradient: whether there are gradients.
        """
        if not any_gradient:
            return self.samples.refusal()
        return self.samples.spend(self.rows)

    def clear(self) -> None:
        """Forget all passes: their gradients have been used or discarded."""
        self._forwards.clear()
        self._traced_task = self._traced_forward = self._traced_rows = None
        self._calls, self._traced_uses = {}, []
        self.collected = 0
