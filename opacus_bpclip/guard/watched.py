"""One trainable parameter: the sum of its clipped gradients, and a check for any others."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from opacus_bpclip.guard.weak import weakly
from opacus_bpclip.rules.precision import norm_dtype

Check = Callable[["WatchedParameter", Tensor], None]


class WatchedParameter:
    """A trainable parameter, and the sum of the examples' contributions to its gradient.

    Clipped gradients never arrive at the parameter through autograd. In eager mode the layers'
    scopes hand the sums over. A compiled graph sends them through autograd to a separate leaf, the
    `sink`. So a gradient that arrives at the parameter itself is not clipped, and is refused before
    it is accumulated.

    Args:
        name: dotted path of the parameter.
        parameter: the parameter.
        refuse: called with this object and a gradient that arrives at the parameter; raises.
        check: called with this object and a sum from a compiled graph; raises if it must not be
            used.

    Attributes:
        sink: a leaf of the parameter's shape, in the dtype of sums, without memory of its own size.
        arrivals: how many gradients from compiled graphs were collected since the last step.
        confirmed: the ways of calling the model in which the parameter's gradient has passed every
            check in eager mode.
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
        # Otherwise a compiler may make a size symbolic, and equal to a batch size of that value.
        torch._dynamo.mark_static(self.sink)
        self.sink.register_post_accumulate_grad_hook(weakly(self._collect))
        # Torch registers no hook on a parameter that is frozen at present.
        trains, p.requires_grad = p.requires_grad, True
        # A pass may go on after a refusal: an unclipped gradient must not stay in p.grad then.
        drop = p.register_post_accumulate_grad_hook(_drop)
        self._handles = [p.register_hook(self._arrive), drop]
        p.requires_grad = trains

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which starts without gradients."""
        at_hand = {"_handles", "sink", "arrivals", "_collected"}
        return {name: value for name, value in vars(self).items() if name not in at_hand}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Watch the parameter's copy: torch copies no hooks of a parameter."""
        vars(self).update(state)
        self.clear()
        self._attach()

    def moved(self) -> str | None:
        """Say that the parameter is no longer where its sums in a compiled graph would go."""
        p, sink = self.parameter, self.sink
        if (sink.device, sink.dtype) == (p.device, norm_dtype(p.dtype)):
            return None
        return (
            f"{self.name} was moved to {p.device} and {p.dtype} after make_private, and a compiled "
            f"graph would send its gradient to {sink.device} in {sink.dtype}. Move the model "
            "first, then call make_private; or train without torch.compile."
        )

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def clear(self) -> None:
        """Discard the sum."""
        self._collected = None
        self.arrivals = 0

    @property
    def is_empty(self) -> bool:
        """Return whether no gradient was collected since the last step."""
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
        if gradient is not None:  # None: a compiled graph that does not reach the parameter.
            self._refuse(self, gradient)

    def _collect(self, sink: Tensor) -> None:
        total, sink.grad = sink.grad, None
        if total is None:
            return  # The graph has not used the parameter.
        self._check(self, total)
        self.add(total)
        self.arrivals += 1


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
