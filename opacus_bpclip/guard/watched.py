"""One trainable parameter: what is collected for it, and what arrives at it from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from opacus_bpclip.rules.precision import norm_dtype

Check = Callable[["WatchedParameter", Tensor], None]


class WatchedParameter:
    """A trainable parameter, and the sum of what its layers' uses contribute to it.

    No graph that clips has an edge to a parameter. In eager mode the sums are delivered; a compiled
    graph sends them through autograd to a leaf of its own, the `sink`. So whatever arrives at the
    parameter itself is foreign, and refused before it is accumulated.

    Args:
        name: dotted path of the parameter.
        parameter: the parameter.
        refuse: called with this object and a gradient that arrives at the parameter; raises.
        check: called with this object and a sum that a compiled graph has sent; raises if it cannot
            be accounted for.

    Attributes:
        sink: has the parameter's shape and none of its memory, in the dtype of sums.
        arrivals: how many gradients of compiled graphs were collected since the last step.
        confirmed: the ways of calling the model in which its gradient has passed every check, in
            eager mode.
    """

    def __init__(self, name: str, parameter: nn.Parameter, refuse: Check, check: Check) -> None:
        self.name = name
        self.parameter = parameter
        self.arrivals = 0
        self.confirmed: set[Hashable] = set()
        self._collected: Tensor | None = None
        self._refuse, self._check = refuse, check
        self._attach()

    def _attach(self) -> None:
        p = self.parameter
        nothing = torch.zeros((), dtype=norm_dtype(p.dtype), device=p.device)
        self.sink = nothing.expand(p.shape).detach().requires_grad_()
        # Or a compiler takes its sizes for open numbers, the same as a batch's that equals one.
        torch._dynamo.mark_static(self.sink)
        self.sink.register_post_accumulate_grad_hook(self._collect)
        # Where a pass goes on after a refusal, nobody may take what has arrived for a gradient.
        drop = p.register_post_accumulate_grad_hook(_drop)
        self._handles = [p.register_hook(self._arrive), drop]

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy starts with, which has no gradients at hand."""
        at_hand = {"_handles", "sink", "arrivals", "_collected"}
        return {name: value for name, value in vars(self).items() if name not in at_hand}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Watch the parameter's copy: torch copies no hooks of a parameter."""
        vars(self).update(state)
        self.clear()
        self._attach()

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def clear(self) -> None:
        """Forget the gradient at hand."""
        self._collected = None
        self.arrivals = 0

    @property
    def is_empty(self) -> bool:
        """Return whether nothing was collected since the last step."""
        return self._collected is None

    def add(self, total: Tensor) -> None:
        """Collect a sum of contributions."""
        # Out of place: autograd may have sent the same memory to another parameter.
        self._collected = total if self._collected is None else self._collected + total

    def take(self) -> Tensor | None:
        """Return the sum of contributions since the last step; ``None`` without any."""
        collected, self._collected = self._collected, None
        return collected

    def _arrive(self, gradient: Tensor | None) -> None:
        if gradient is not None:  # A compiled graph that does not reach the parameter.
            self._refuse(self, gradient)

    def _collect(self, sink: Tensor) -> None:
        total, sink.grad = sink.grad, None
        if total is None:
            return  # Of a layer that the graph has left out.
        self._check(self, total)
        self.add(total)
        self.arrivals += 1


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
