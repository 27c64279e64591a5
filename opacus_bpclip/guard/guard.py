"""On every batch: each parameter's gradient is its layer's clipped one, and nothing else.

The guard watches one model in eager mode. In the forward pass it counts each layer's calls and
checks the batch dimension. In the backward pass it follows the gradient itself: the tensor that
arrives at a parameter must be *the* tensor that the layer's own node produced. Had anything else
contributed (a second use, a penalty in the loss, ``F.linear(x, layer.weight)``), autograd would
have summed into another tensor. The sum is taken at that moment, so that nothing done to ``p.grad``
afterwards can change it.

Inside a graph traced by ``torch.compile`` none of this runs; there, a parameter is let through
only once an eager batch has vouched for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn

from opacus_bpclip.errors import PrivacyViolationError
from opacus_bpclip.guard.call_checks import (
    changed_layer,
    changed_on_the_way,
    first_in_backward,
    other_dtype,
    outside_forward,
    replaced_parameter,
    used_too_often,
)
from opacus_bpclip.guard.gradient_checks import wrong_gradient
from opacus_bpclip.guard.passes import BackwardPasses
from opacus_bpclip.guard.provenance import (
    Receipt,
    WatchedParameter,
    follow,
    parameter_edges,
    watch_edge,
)
from opacus_bpclip.guard.ranks import several_ranks
from opacus_bpclip.losses.criterion import LossWatch
from opacus_bpclip.model.coverage import (
    batch_normalization_problem,
    batch_normalizations,
    edited_problem,
    unfrozen_problem,
)
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.replacements import mixes_examples
from opacus_bpclip.rules import Inputs


class GradientGuard:
    """Watch the trainable layers of one model.

    Args:
        model: the root module.
        layers: its trainable layers.

    Attributes:
        violation: why the gradients at hand must not be used, or ``None``.
        refused: whether the optimizer has refused them.
        accumulated: how many backward passes the last gradients added up.
        passes: the backward passes that they came from.
        undoes_mean: whether the layers take gradients for those of a mean.
        loss: the watch of the criterion that every backward pass must come through, if any.
    """

    def __init__(self, model: nn.Module, layers: Iterable[Layer]) -> None:
        layers = tuple(layers)
        self._model = model
        self.violation: str | None = None
        self.refused = False
        self.accumulated = 1
        self.passes = BackwardPasses()
        self.loss: LossWatch | None = None
        self.undoes_mean = False
        self._compiled = False
        self._in_forward = False
        self._batch_size = 0
        self._forward = 0  # the number of the latest forward pass
        self._calls: dict[str, int] = {}  # of each layer in the latest forward pass
        self._watched: dict[Tensor, WatchedParameter] = {}
        for layer in layers:
            for name, parameter in layer.module.named_parameters(recurse=False):
                if parameter in self._watched:
                    self._watched[parameter].uses += layer.uses
                elif parameter.requires_grad:
                    self._watched[parameter] = WatchedParameter(
                        f"{layer.name}.{name}", parameter, layer.uses, self._judge, self.fail
                    )
        self._of_layer = {
            layer.name: tuple(self._watched[parameter] for parameter in layer.parameters)
            for layer in layers
        }
        self._parameters = dict(model.named_parameters())
        self._versions: list[int] = []
        self._frozen = [
            (name, parameter)
            for name, parameter in self._parameters.items()
            if parameter not in self._watched
        ]

    def remove(self) -> None:
        """Stop watching."""
        for watched in self._watched.values():
            watched.remove()

    def clear(self) -> None:
        """Forget the gradients at hand: they have been used or thrown away."""
        self.violation = None
        self.refused = False
        self.passes.clear()
        for watched in self._watched.values():
            watched.clear()

    def finish(self) -> None:
        """Forget the gradients at hand, and the forward pass that they came from."""
        self.accumulated = max(1, self.collected)
        self.clear()
        self._compiled = False

    @property
    def pending(self) -> bool:
        """Return whether clipped gradients wait for their noise."""
        sums = (getattr(parameter, "summed_grad", None) for parameter in self._watched)
        return self.collected > 0 or any(
            summed is not None and not hasattr(summed, "_processed") for summed in sums
        )

    @property
    def collected(self) -> int:
        """Return how many backward passes the gradients at hand add up."""
        return max((watched.passes for watched in self._watched.values()), default=0)

    # Forward

    def enter_forward(self, batch_size: int) -> None:
        """Begin a forward pass of the root over ``batch_size`` examples."""
        self.require(several_ranks())
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                self.fail(unfrozen_problem(name))
        # Looked up anew: a module may have been put in the place of another.
        for name, norm in batch_normalizations(self._model).items():
            if mixes_examples(norm):
                self.fail(batch_normalization_problem(name, norm))
        self._compiled = False
        self._calls.clear()
        self._forward += 1
        self._in_forward = True
        self._batch_size = batch_size
        self._versions = [parameter._version for parameter in self._parameters.values()]

    def leave_forward(self) -> None:
        """End a forward pass of the root."""
        self._in_forward = False
        versions, self._versions = self._versions, []
        for (name, parameter), version in zip(self._parameters.items(), versions, strict=False):
            if parameter._version != version:
                self.fail(edited_problem(name))

    def enter_layer(self, layer: Layer) -> bool:
        """Count one use of a layer; return whether it is one to follow through the backward pass.

        A use inside a backward pass is activation checkpointing's second run of one that was
        checked and counted the first time.
        """
        calls = self._calls.get(layer.name, 0)
        if _in_backward():
            self.require(replaced_parameter(layer))
            if not calls:
                self.fail(first_in_backward(layer))
            return False
        if not self._in_forward:
            self.fail(outside_forward(layer))
        if calls >= layer.uses:
            self.fail(used_too_often(layer))
        self._calls[layer.name] = calls + 1
        self.require(changed_layer(layer))
        return True

    @property
    def examples(self) -> int:
        """Return how many examples the latest forward pass is over."""
        return self._batch_size

    @property
    def forward(self) -> int:
        """Return the number of the latest forward pass."""
        return self._forward

    def check_output(self, layer: Layer, y: Tensor) -> None:
        """Check that a layer made ``y`` with the parameters that are watched, in their dtype."""
        self.require(replaced_parameter(layer))
        self.require(other_dtype(layer, y))

    def expect(self, layer: Layer) -> Receipt:
        """Return what a node is to sign for the gradients of the layer's parameters, in order.

        Args:
            layer: the layer; the node stands in for one call of it.
        """
        return self._receipt(self._of_layer[layer.name])

    def follow(self, layer: Layer, y: Tensor, inputs: Inputs) -> None:
        """Follow the gradients that this call of the layer will send to its parameters.

        Args:
            layer: the layer; its output has been checked.
            y: what it made.
            inputs: of what; the graph behind them is somebody else's.
        """
        stop = {x.grad_fn for x in inputs if x is not None}
        own = set(layer.parameters)
        for node, edges in parameter_edges(y, stop):
            # Another layer's parameter, used in here, is not what this layer's rule bounds.
            to_own = [(index, self._watched[leaf]) for index, leaf in edges if leaf in own]
            if to_own:
                indices, watched = zip(*to_own, strict=True)
                follow(node, indices, self._receipt(watched))

    def join(self, layer: Layer, clipped: Tensor, y: Tensor) -> None:
        """Check, when the time comes, that the layer gets the very gradient that was clipped.

        Args:
            layer: the layer.
            clipped: what its clip made of ``y``.
            y: what the layer made.
        """

        watch_edge(clipped, y, lambda: self.fail(changed_on_the_way(layer)))

    # Backward

    def note_compiled(self) -> None:
        """Note that part of the model runs as a compiled graph, unseen by the guard."""
        self._compiled = True

    def require(self, problem: str | None) -> None:
        """Make the gradients at hand unusable, and raise, if there is a problem.

        Raises:
            PrivacyViolationError: there is.
        """
        if problem is not None:
            self.fail(problem)

    def fail(self, reason: str) -> NoReturn:
        """Make the gradients at hand unusable, and raise.

        Raises:
            PrivacyViolationError: always.
        """
        self.violation = reason
        raise PrivacyViolationError(reason)

    def _receipt(self, watched: Sequence[WatchedParameter]) -> Receipt:
        begin = partial(self._begin_backward, self._forward, self._batch_size)
        return Receipt(watched, begin, self.fail)

    def _begin_backward(self, forward: int, rows: int) -> None:
        self.require(self.passes.begin(forward, rows))

    def _judge(self, watched: WatchedParameter, gradient: Tensor) -> None:
        """Check a gradient that is about to reach its parameter."""
        if self.loss is not None:
            self.require(self.loss.problem(watched.name))
        elif self.undoes_mean:
            self.require(LossWatch.foreign(watched.name))
        problem = wrong_gradient(
            watched,
            gradient,
            compiled=self._compiled,
            alone=not self.passes.accumulation_allowed,
            several=self.passes.several,
        )
        self.require(problem)
        watched.vouched = True

    def watches(self, parameter: nn.Parameter) -> bool:
        """Return whether what arrives at a parameter is checked and collected."""
        return parameter in self._watched

    def take(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the parameter's sum of contributions since the last step, ``None`` without any."""
        return self._watched[parameter].take()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
