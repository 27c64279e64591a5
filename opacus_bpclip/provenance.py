"""Follow one parameter's gradient from the layer that computed it to the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NoReturn

import torch
from torch import Tensor, nn

Fail = Callable[[str], NoReturn]


class WatchedParameter:
    """A trainable parameter, and where the numbers in its ``grad`` came from.

    Args:
        name: dotted path of the parameter.
        parameter: the parameter.
        receive: called with this object and the gradient that is about to be accumulated.
        fail: called with the reason when the gradient cannot be accounted for; raises.

    Attributes:
        sent: the gradient that the layer's own node produced, on its way to the parameter.
        passes: backward passes accumulated in ``p.grad`` since it was last emptied.
        vouched: whether an eager batch has passed every check.
    """

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        receive: Callable[[WatchedParameter, Tensor], None],
        fail: Fail,
    ) -> None:
        self.name = name
        self.parameter = parameter
        self.sent: Tensor | None = None
        self.passes = 0
        self.vouched = False
        self._version = -1
        self._fail = fail
        self._handles = [
            parameter.register_hook(lambda gradient: receive(self, gradient)),
            parameter.register_post_accumulate_grad_hook(self._note_version),
        ]

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def clear(self) -> None:
        """Forget the gradient at hand."""
        self.sent = None
        self.passes = 0

    def follow(self, node: torch.autograd.graph.Node, index: int) -> None:
        """Note the gradient that ``node`` sends along its ``index``-th edge, once."""
        spent = False

        def send(inputs: tuple[Tensor | None, ...], _: tuple[Tensor | None, ...]) -> None:
            nonlocal spent
            if spent:
                self._fail(
                    f"The backward pass ran twice for one forward pass through {self.name}: one "
                    "example would contribute twice. Add the losses and call backward once."
                )
            spent = True
            self.sent = inputs[index]

        node.register_hook(send)

    def take(self) -> Tensor | None:
        """Return the sum of contributions in ``p.grad``, emptying it; ``None`` without any."""
        gradient, self.parameter.grad = self.parameter.grad, None
        if not self.passes:
            return None
        if gradient is None or gradient._version != self._version:
            self._fail(
                f"{self.name}.grad was changed between backward and step (clip_grad_norm_, "
                "GradScaler.unscale_, an assignment?): the change depends on the whole batch, so "
                "the bound no longer holds. Leave gradients alone until the optimizer has stepped."
            )
        return gradient

    def _note_version(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.passes += 1
        self._version = parameter.grad._version


def parameter_edges(
    y: Tensor, stop: torch.autograd.graph.Node | None
) -> Iterator[tuple[torch.autograd.graph.Node, int, Tensor]]:
    """Yield ``(node, index, leaf)`` for each edge from the nodes behind ``y`` to a leaf tensor.

    Args:
        y: the layer's output.
        stop: the node that made the layer's input, which is not crossed.
    """
    assert y.grad_fn is not None
    queue, seen = [y.grad_fn], {stop, y.grad_fn}
    while queue:
        node = queue.pop()
        for index, (following, _) in enumerate(node.next_functions):
            leaf = getattr(following, "variable", None)
            if leaf is not None:
                yield node, index, leaf
            elif following is not None and following not in seen:
                seen.add(following)
                queue.append(following)
