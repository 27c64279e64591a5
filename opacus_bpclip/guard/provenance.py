"""Follow one parameter's gradient from the layer that computed it to the optimizer's step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

Fail = Callable[[str], NoReturn]


class WatchedParameter:
    """A trainable parameter, and the sum of what its layer's calls sent to it.

    The sum is taken the moment it is known to be the layer's own, and ``p.grad`` is emptied: what
    later hooks, gradient clippers or assignments do to ``p.grad`` changes nothing, and the sum
    without noise is on show to nobody.

    Args:
        name: dotted path of the parameter.
        parameter: the parameter.
        uses: how many calls of its layer may send to it in one backward pass.
        judge: called with this object and the gradient that is about to be accumulated; raises if
            it cannot be accounted for.
        fail: called with the reason when the backward pass runs twice; raises.

    Attributes:
        sent: the gradients that the layer's own nodes produced, on their way to the parameter.
        passes: backward passes collected since the last step.
        vouched: whether an eager batch has passed every check.
    """

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        uses: int,
        judge: Callable[[WatchedParameter, Tensor], None],
        fail: Fail,
    ) -> None:
        self.name = name
        self.parameter = parameter
        self.uses = uses
        self.sent: list[tuple[Tensor, int]] = []
        self.passes = 0
        self.vouched = False
        self._arrived: Tensor | None = None
        self._version = 0
        self._collected: Tensor | None = None
        self._collected_version = 0
        self._judge = judge
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
        at_hand = {"_handles", "sent", "passes", "_arrived", "_collected"}
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
        self.sent = []
        self._arrived = self._collected = None
        self.passes = 0

    def is_sum_of_sent(self, gradient: Tensor) -> bool:
        """Return whether a gradient is what the layer's calls sent, and from no more than allowed.

        One call's gradient arrives as the very tensor that was sent. Several are added up by
        autograd in the order of their arrival, which can be done again to the bit.
        """
        if len(self.sent) > self.uses:
            return False
        total, *others = (sent for sent, _ in self.sent)
        if not others:
            # The same numbers in the same memory.
            return total.is_set_to(gradient)
        for sent in others:
            total = total + sent
        return torch.equal(total, gradient)

    def take(self) -> Tensor | None:
        """Return the sum of contributions since the last step; ``None`` without any."""
        collected, self._collected = self._collected, None
        if collected is not None:
            self._require_unchanged(collected, self._collected_version)
        return collected

    def _hooks(self) -> tuple[OrderedDict[int, Any], OrderedDict[int, Any]]:
        # Looked up anew: somebody may have put another dict in the place of one.
        before = cast("OrderedDict[int, Any]", self.parameter._backward_hooks)
        after = cast("OrderedDict[int, Any]", self.parameter._post_accumulate_grad_hooks)
        return before, after

    def _arrive(self, gradient: Tensor) -> None:
        for sent, version in self.sent:
            self._require_unchanged(sent, version)
        self._judge(self, gradient)
        self.sent = []
        # With other hooks around, out of their reach: `.data` leaves no trace in a version.
        before, after = self._hooks()
        alone = len(before) == len(after) == 1
        self._arrived = _alias(gradient) if alone else gradient.clone()
        self._version = self._arrived._version

    def _collect(self, parameter: Tensor) -> None:
        # Only what is accumulated counts: torch.autograd.grad takes a look and leaves.
        assert self._arrived is not None
        gradient, self._arrived = self._arrived, None
        self._require_unchanged(gradient, self._version)
        # Out of place: autograd may have sent the same memory to another parameter.
        self._collected = gradient if self._collected is None else self._collected + gradient
        self._collected_version = self._collected._version
        self.passes += 1
        parameter.grad = None

    def _require_unchanged(self, gradient: Tensor, version: int) -> None:
        if gradient._version != version:
            self._fail(
                f"A hook on {self.name} changed its gradient in place, after it was clipped. "
                "Remove the hook."
            )


def _alias(gradient: Tensor) -> Tensor:
    # Keeps the memory from being used for anything else, as a reference to the tensor would.
    # Unlike that, it lets autograd take the tensor over into p.grad instead of copying it.
    return gradient.detach()


class Receipt:
    """What one call of a layer sends to its parameters, once.

    Args:
        watched: the parameters that it may send to.
        note: called when gradients are sent.
        fail: called with the reason when they are sent a second time; raises.
    """

    def __init__(
        self, watched: Sequence[WatchedParameter], note: Callable[[], None], fail: Fail
    ) -> None:
        self._watched = watched
        self._note = note
        self._fail = fail
        self._spent = False

    def sign(self, gradients: Iterable[Tensor | None]) -> None:
        """Note the gradients that are sent, one for each parameter; ``None`` for none."""
        if self._spent:
            self._fail(
                "The backward pass ran twice for one forward pass through "
                f"{self._watched[0].name}: one example would contribute twice. Add the losses and "
                "call backward once."
            )
        self._spent = True
        for watched, gradient in zip(self._watched, gradients, strict=True):
            if gradient is not None:
                watched.sent.append((_alias(gradient), gradient._version))
        self._note()


def follow(node: torch.autograd.graph.Node, indices: Sequence[int], receipt: Receipt) -> None:
    """Have a receipt signed for the gradients that ``node`` sends along some of its edges.

    Args:
        node: made by a call of a layer.
        indices: of the edges to the receipt's parameters.
        receipt: of the call, or of this node's part in it.
    """

    def send(inputs: tuple[Tensor | None, ...], _: tuple[Tensor | None, ...]) -> None:
        receipt.sign(inputs[index] for index in indices)

    node.register_hook(send)


def watch_edge(later: Tensor, earlier: Tensor, changed: Callable[[], None]) -> None:
    """Call ``changed`` if the gradient that arrives at a tensor is not the one that was sent.

    Args:
        later: made from ``earlier`` alone, by one autograd function; not used by anybody yet.
        earlier: the tensor; whatever else is made from it is found, too.
        changed: called in the backward pass.
    """
    assert later.grad_fn is not None
    assert earlier.grad_fn is not None
    index = earlier.output_nr
    sent: list[tuple[Tensor, int]] = []

    def send(gradients: tuple[Tensor | None, ...], _: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[0]
        if gradient is not None:
            sent[:] = [(gradient, gradient._version)]

    def arrive(gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[index]
        if gradient is None:
            return
        expected, version = sent.pop() if sent else (None, 0)
        if gradient is not expected or gradient._version != version:
            changed()

    later.grad_fn.register_hook(send)
    earlier.grad_fn.register_prehook(arrive)


def parameter_edges(
    y: Tensor, stop: Set[torch.autograd.graph.Node | None]
) -> Iterator[tuple[torch.autograd.graph.Node, list[tuple[int, Tensor]]]]:
    """Yield the nodes behind ``y`` that have edges to leaf tensors, with ``(index, leaf)`` of each.

    Args:
        y: the layer's output.
        stop: the nodes that made the layer's inputs, which are not crossed.
    """
    assert y.grad_fn is not None
    queue, seen = [y.grad_fn], {*stop, y.grad_fn}
    while queue:
        node = queue.pop()
        edges = []
        for index, (following, _) in enumerate(node.next_functions):
            if following is None or following in seen:
                continue
            leaf = getattr(following, "variable", None)
            if leaf is not None:
                edges.append((index, leaf))
            else:
                seen.add(following)
                queue.append(following)
        if edges:
            yield node, edges
