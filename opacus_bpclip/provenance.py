"""Follow one parameter's gradient from the layer that computed it to the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

# To a gradient in a hook: the hook's own, and autograd's list of arguments.
_OWN_REFERENCES = 2

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
        self._arrived: Tensor | _Lent | None = None
        self._version = 0
        self._collected: Tensor | None = None
        self._judge = judge
        self._fail = fail
        self._handles = [
            parameter.register_hook(self._arrive),
            parameter.register_post_accumulate_grad_hook(self._collect),
        ]

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def clear(self) -> None:
        """Forget the gradient at hand."""
        self.sent = []
        self._arrived = self._collected = None
        self.passes = 0

    def follow(self, node: torch.autograd.graph.Node, index: int, note: Callable[[], None]) -> None:
        """Note the gradient that ``node`` sends along its ``index``-th edge, once.

        Args:
            node: made by a call of the layer.
            index: of its edge to the parameter.
            note: called when the gradient is sent.
        """
        spent = False

        def send(inputs: tuple[Tensor | None, ...], _: tuple[Tensor | None, ...]) -> None:
            nonlocal spent
            if spent:
                self._fail(
                    f"The backward pass ran twice for one forward pass through {self.name}: one "
                    "example would contribute twice. Add the losses and call backward once."
                )
            spent = True
            gradient = inputs[index]
            if gradient is not None:
                self.sent.append((gradient, gradient._version))
                note()

        node.register_hook(send)

    def is_sum_of_sent(self, gradient: Tensor) -> bool:
        """Return whether a gradient is what the layer's calls sent, and from no more than allowed.

        One call's gradient arrives as the very tensor that was sent. Several are added up by
        autograd in the order of their arrival, which can be done again to the bit.
        """
        if len(self.sent) > self.uses:
            return False
        total, *others = (sent for sent, _ in self.sent)
        if not others:
            return total is gradient
        for sent in others:
            total = total + sent
        return torch.equal(total, gradient)

    def take(self) -> Tensor | None:
        """Return the sum of contributions since the last step; ``None`` without any."""
        collected, self._collected = self._collected, None
        return collected

    def _arrive(self, gradient: Tensor) -> None:
        for sent, version in self.sent:
            self._require_unchanged(sent, version)
        self._judge(self, gradient)
        self.sent = []
        # Autograd copies a gradient that somebody else holds on to. Where it can be told from any
        # other without holding it, it is let go.
        self._arrived = _Lent.of(gradient, self.parameter) or gradient
        self._version = gradient._version

    def _collect(self, parameter: Tensor) -> None:
        # Only what is accumulated counts: torch.autograd.grad takes a look and leaves.
        assert self._arrived is not None
        gradient, self._arrived = self._arrived, None
        if isinstance(gradient, _Lent):
            assert parameter.grad is not None
            if not gradient.is_in(parameter.grad):
                self._fail(
                    f"Something replaced the gradient of {self.name} after it was clipped, on its "
                    f"way to {self.name}.grad. Remove the hook that did."
                )
            gradient = parameter.grad
        self._require_unchanged(gradient, self._version)
        # Out of place: autograd may have sent the same tensor to another parameter.
        self._collected = gradient if self._collected is None else self._collected + gradient
        self.passes += 1
        parameter.grad = None

    def _require_unchanged(self, gradient: Tensor, version: int) -> None:
        if gradient._version != version:
            self._fail(
                f"A hook on {self.name} changed its gradient in place, after it was clipped. "
                "Remove the hook."
            )


class _Lent(NamedTuple):
    """A gradient that autograd may keep as ``p.grad``, recognised by the memory it is in.

    The storage is held, so that no other tensor can come to lie there.
    """

    storage: torch.UntypedStorage
    place: tuple[int, tuple[int, ...], tuple[int, ...]]

    @classmethod
    def of(cls, gradient: Tensor, parameter: nn.Parameter) -> _Lent | None:
        """Return the gradient as lent, if autograd is going to keep it rather than a copy."""
        kept = (
            parameter.grad is None
            and gradient.stride() == parameter.stride()
            and gradient.dtype == parameter.dtype
            and gradient.layout == torch.strided
            and not torch.is_grad_enabled()
            and _references(gradient) <= _OWN_REFERENCES
            # Ours; another one may put something else in its place.
            and len(parameter._backward_hooks or ()) == 1
            and len(parameter._post_accumulate_grad_hooks or ()) == 1
        )
        return cls(gradient.untyped_storage(), _place(gradient)) if kept else None

    def is_in(self, gradient: Tensor) -> bool:
        """Return whether a tensor is the one that was lent."""
        same = gradient.untyped_storage()._cdata == self.storage._cdata
        return same and _place(gradient) == self.place


def _references(x: Tensor) -> int:
    # Not public: where a release of torch lacks it, every gradient is held and copied.
    count: int = getattr(x, "_use_count", lambda: _OWN_REFERENCES + 1)()
    return count


def _place(x: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return int(x.storage_offset()), tuple(x.shape), tuple(x.stride())


def parameter_edges(
    y: Tensor, stop: Set[torch.autograd.graph.Node | None]
) -> Iterator[tuple[torch.autograd.graph.Node, int, Tensor]]:
    """Yield ``(node, index, leaf)`` for each edge from the nodes behind ``y`` to a leaf tensor.

    Args:
        y: the layer's output.
        stop: the nodes that made the layer's inputs, which are not crossed.
    """
    assert y.grad_fn is not None
    queue, seen = [y.grad_fn], {*stop, y.grad_fn}
    while queue:
        node = queue.pop()
        for index, (following, _) in enumerate(node.next_functions):
            leaf = getattr(following, "variable", None)
            if leaf is not None:
                yield node, index, leaf
            elif following is not None and following not in seen:
                seen.add(following)
                queue.append(following)
