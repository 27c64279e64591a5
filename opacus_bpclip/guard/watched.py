"""One trainable parameter: what is collected for it, and what arrives at it from elsewhere."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, cast

from torch import Tensor, nn

Fail = Callable[[str], None]


class WatchedParameter:
    """A trainable parameter, and the sum of what its layers' uses contribute to it.

    In eager mode the sums are delivered, and no graph that clips has an edge to a parameter. So a
    gradient that arrives through autograd is foreign, unless it comes out of a compiled graph. Such
    a gradient is taken the moment it arrives, and ``p.grad`` is emptied: what later hooks, gradient
    clippers or assignments do to ``p.grad`` changes nothing, and nobody sees a sum without noise.

    Args:
        name: dotted path of the parameter.
        parameter: the parameter.
        check: called with this object and the gradient that is about to be accumulated; raises if
            it cannot be accounted for.
        fail: called with the reason when a hook changes a gradient; raises.

    Attributes:
        arrivals: how many gradients of compiled graphs were collected since the last step.
        confirmed: the ways of calling the model in which its gradient has passed every check, in
            eager mode.
    """

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        check: Callable[[WatchedParameter, Tensor], None],
        fail: Fail,
    ) -> None:
        self.name = name
        self.parameter = parameter
        self.arrivals = 0
        self.confirmed: set[Hashable] = set()
        self._arrived: Tensor | None = None
        self._version = 0
        self._collected: Tensor | None = None
        self._check = check
        self._fail = fail
        self._attach()

    def _attach(self) -> None:
        arrive = self.parameter.register_hook(self._arrive)
        collect = self.parameter.register_post_accumulate_grad_hook(self._collect)
        self._handles = [arrive, collect]
        # Ahead of the hooks that the parameter has already: an optimizer in one of them would step
        # on the sum without noise.
        for hooks, handle in zip(self._hooks(), self._handles, strict=True):
            # Torch goes by the order of insertion, which move_to_end does not change.
            others = {key: hooks.pop(key) for key in tuple(hooks) if key != handle.id}
            hooks.update(others)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy starts with, which has no gradients at hand."""
        at_hand = {"_handles", "arrivals", "_arrived", "_collected"}
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
        self._arrived = self._collected = None
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

    def _hooks(self) -> tuple[OrderedDict[int, Any], OrderedDict[int, Any]]:
        # Looked up anew: somebody may have put another dict in the place of one.
        before = cast("OrderedDict[int, Any]", self.parameter._backward_hooks)
        after = cast("OrderedDict[int, Any]", self.parameter._post_accumulate_grad_hooks)
        return before, after

    def _arrive(self, gradient: Tensor | None) -> None:
        if gradient is None:
            return  # A compiled graph that does not reach the parameter.
        self._check(self, gradient)
        # With other hooks around, out of their reach: `.data` leaves no trace in a version.
        before, after = self._hooks()
        alone = len(before) == len(after) == 1
        # An alias keeps the memory from being used for anything else. Unlike the tensor itself, it
        # lets autograd take that over into p.grad instead of copying it.
        self._arrived = gradient.detach() if alone else gradient.clone()
        self._version = self._arrived._version

    def _collect(self, parameter: Tensor) -> None:
        # Only what is accumulated counts: torch.autograd.grad takes a look and leaves.
        gradient, self._arrived = self._arrived, None
        if gradient is None:
            return
        if gradient._version != self._version:
            self._fail(
                f"A hook on {self.name} changed its gradient in place, after it was clipped. "
                "Remove the hook."
            )
        self.add(gradient)
        self.arrivals += 1
        parameter.grad = None
