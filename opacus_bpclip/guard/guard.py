"""The check, on every batch, that each parameter's gradient is a sum of clipped gradients only.

The guard watches one model in eager mode. In the forward pass it counts each layer's calls and
checks the batch axis. In the backward pass it collects the clipped sums that the layers' scopes
hand over, and keeps them apart from ``p.grad``, so that no code can change them there. The
autograd graph of a clipped layer does not reach its parameters. A gradient that does arrive at a
parameter (from a second use, a penalty in the loss, ``F.linear(x, layer.weight)``) is not clipped,
and is refused.

In a graph traced by ``torch.compile`` none of this runs. Its gradients are released only after the
same way of calling the model has passed every check in eager mode (`Forms`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from opacus_bpclip.errors import PrivacyViolationError
from opacus_bpclip.guard.call_checks import (
    changed_layer,
    first_in_backward,
    normalizes_batch,
    outside_forward,
    replaced_parameter,
    used_too_often,
)
from opacus_bpclip.guard.forms import Form, Forms
from opacus_bpclip.guard.gradient_checks import unclipped_gradient, unusable_gradient
from opacus_bpclip.guard.parameters import GuardedParameters
from opacus_bpclip.guard.passes import MIXED, BackwardPasses
from opacus_bpclip.guard.precision import Roundings, backward_under_autocast
from opacus_bpclip.guard.ranks import Ranks
from opacus_bpclip.guard.watched import WatchedParameter
from opacus_bpclip.losses.criterion import LossWatch
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.rules.precision import under_autocast


class GradientGuard:
    """Watch the trainable layers of one model.

    Args:
        model: the root module.
        layers: its trainable layers.
        whole: for sharded models, the whole parameter by the shard that the optimizer has.
        ranks: the processes that train together; only this one by default.

    Attributes:
        parameters: the model's parameters, and the sums collected for them.
        idle: whether the current pass has no examples and runs only because other ranks wait.
        violation: why the current gradients must not be used; ``None`` if they may.
        refused: whether the optimizer has refused the current gradients.
        accumulated: how many backward passes the last step's gradients added up.
        passes: the backward passes that the current gradients came from.
        undoes_mean: whether the loss is a mean, whose division by the batch size layers undo.
        roundings: finds where a mean loss's gradients are rounded.
        loss: the watch of the criterion that every backward pass must come through, if any.
        forget: called when the current gradients are discarded.
        joint: whether all layers share one budget. A layer may then have any number of uses.
        by_functions: the parameters that functions outside of layers with a rule are called on.
        forms: the ways in which the model was called.
        ran_compiled: whether a part of the latest forward pass ran as a compiled graph.
        rehearsing: whether a rehearsal runs, whose gradients are checked and not collected.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[Layer],
        whole: Mapping[nn.Parameter, nn.Parameter] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.idle = False
        self._model = model
        self.violation: str | None = None
        self.refused = False
        self.accumulated = 1
        self.passes = BackwardPasses()
        self.loss: LossWatch | None = None
        self.undoes_mean = self.joint = False
        self.forget: Callable[[], None] = _nothing
        self.by_functions: set[nn.Parameter] = set()
        self.forms = Forms()
        self.ran_compiled = self.rehearsing = self._in_forward = False
        self._batch_size = 0
        self._rows: int | Tensor = 0
        self._forward = 0  # the number of the latest forward pass
        self._calls: dict[str, int] = {}  # of each layer in the latest forward pass
        self.parameters = GuardedParameters(
            model, layers, whole or {}, self._refuse_unclipped, self._check_arrival
        )
        self.roundings = Roundings(self.parameters.trained)

    def remove(self) -> None:
        """Stop watching."""
        self.parameters.remove()

    def clear(self) -> None:
        """Discard the current gradients: they have been used, or must not be."""
        self.violation = None
        self.refused = False
        self.passes.clear()
        self.forget()
        self.parameters.clear()

    def finish(self) -> None:
        """Discard the current gradients and the state of the forward pass that they came from."""
        self.accumulated = max(1, self.collected)
        self.clear()
        self.ran_compiled = False

    @property
    def pending(self) -> bool:
        """Return whether clipped gradients wait for their noise."""
        return self.collected > 0 or self.parameters.wait

    @property
    def collected(self) -> int:
        """Return how many backward passes the current gradients add up."""
        return max(self.parameters.arrivals, self.passes.collected)

    # Forward

    def enter_forward(self, batch_size: int, present: Tensor | None = None) -> None:
        """Begin a forward pass of the root; ``present`` is ``[B]``, the rows without padding."""
        self.require(self.ranks.problem())
        if self.undoes_mean:
            self.require(self.roundings.of_parameters())
        self.require(self.parameters.unexamined())
        # Search again in each pass: a module may have been replaced.
        self.require(normalizes_batch(self._model))
        self.ran_compiled = False
        self._calls = {}
        self._forward += 1
        self._in_forward = True
        self._batch_size = batch_size
        self._rows = batch_size if present is None else present.sum()
        self.parameters.begin_forward()

    def leave_forward(self) -> None:
        """End a forward pass of the root."""
        self._in_forward = False
        self.require(self.parameters.edited())

    def enter_layer(self, layer: Layer) -> bool:
        """Count one use of a layer; return whether its backward pass must be clipped.

        A use inside a backward pass is activation checkpointing's second run of one counted before.
        """
        calls = self._calls.get(layer.name, 0)
        if _in_backward():
            self.require(replaced_parameter(layer))
            if not calls:
                self.fail(first_in_backward(layer))
            return False
        if not self._in_forward:
            self.fail(outside_forward(layer))
        if not self.joint and calls >= layer.uses:
            self.fail(used_too_often(layer))
        self._calls[layer.name] = calls + 1
        self.require(changed_layer(layer))
        return True

    @property
    def examples(self) -> int:
        """Return the number of examples in the latest forward pass."""
        return self._batch_size

    @property
    def forward(self) -> int:
        """Return the number of the latest forward pass."""
        return self._forward

    def check_output(self, layer: Layer, y: Tensor) -> None:
        """Check that a layer made ``y`` with the watched parameters, in a dtype that can train."""
        self.require(replaced_parameter(layer))
        self.check_precision(layer.name, y.dtype)

    def check_precision(self, name: str, dtype: torch.dtype) -> None:
        """Check that a part of the model may have gradients of this dtype."""
        self.require(self.roundings.of_part(name, dtype, mean=self.undoes_mean))

    def check_rounding(self, output: object) -> None:
        """Check that a mean loss's gradients are not rounded to low precision in the model."""
        if self.undoes_mean:
            self.require(self.roundings.of_model(output))
            self.roundings.watch(output, self._batch_size, self.fail)

    # Backward

    def require(self, problem: str | None) -> None:
        """Call `fail` if there is a problem.

        Raises:
            PrivacyViolationError: there is a problem.
        """
        if problem is not None:
            self.fail(problem)

    def fail(self, reason: str) -> None:
        """Mark the current gradients as unusable, and raise.

        While other ranks wait for this one inside a pass, the pass goes on instead, and its result
        is not used: the next meeting of the ranks raises, before anything is released.

        Raises:
            PrivacyViolationError: no other rank waits inside this pass.
        """
        if not (self.ranks.in_pass and self.violation):
            self.violation = reason
        self.forget()
        self.ranks.refuse(reason)
        if self.ranks.in_pass:
            return
        raise PrivacyViolationError(reason)

    def begin_backward(self) -> Callable[[], None]:
        """Return what the latest forward pass's scope calls when a gradient arrives."""
        return partial(self._begin_backward, self._forward, self._rows, self._calls)

    def _begin_backward(self, forward: int, rows: int | Tensor, calls: Mapping[str, int]) -> None:
        if self.idle:
            return
        if self.undoes_mean and under_autocast():
            self.fail(backward_under_autocast(compiled=False))
        self.require(self.passes.begin(forward, rows, calls))
        self._check_mixed()

    def _check_mixed(self) -> None:
        if self.joint and self.passes.is_mixed:
            self.fail(MIXED)

    def collector(self) -> Callable[[Mapping[nn.Parameter, Tensor]], None]:
        """Return what the latest forward pass's scope calls with its clipped sums."""
        return partial(self._collect, self.forms.at_hand)

    def _collect(self, form: Form | None, sums: Mapping[nn.Parameter, Tensor]) -> None:
        if self.idle:
            return
        for parameter, total in sums.items():
            watched = self.parameters[parameter]
            self._check_loss(watched)
            if not self.rehearsing:
                self.require(unusable_gradient(watched, total))
                watched.add(total)
            # A compiled graph runs functions on parameters unclipped: eager checks say nothing.
            if form is not None and parameter not in self.by_functions:
                self.forms.confirm(form, watched)
        self.passes.collected = self.passes.count

    def _check_loss(self, watched: WatchedParameter) -> None:
        if self.loss is not None:
            self.require(self.loss.problem(watched.name))
        elif self.undoes_mean:
            self.require(LossWatch.other_criterion(watched.name))

    def _refuse_unclipped(self, watched: WatchedParameter, _: Tensor) -> None:
        """Refuse a gradient that arrives at a parameter: clipped gradients never do."""
        self._check_loss(watched)
        self.fail(unclipped_gradient(watched, graphs=self.ran_compiled or self.forms.have_graphs))

    def _check_arrival(self, watched: WatchedParameter, gradient: Tensor) -> None:
        """Check a sum of clipped gradients from a compiled graph."""
        self._check_loss(watched)
        if under_autocast():
            self.fail(backward_under_autocast(compiled=True))
        if self.undoes_mean:
            self.require(self.roundings.of_parameters())
        self.require(self.ranks.graphs_problem)
        self.require(unusable_gradient(watched, gradient))
        self.require(self.passes.note_traced())
        self._check_mixed()

    @property
    def arrived(self) -> list[WatchedParameter]:
        """Return the parameters with gradients from compiled graphs since the last step."""
        return self.parameters.arrived

    def take(self, parameter: nn.Parameter) -> Tensor | None:
        """Return a parameter's sum of contributions since the last step, ``None`` without any."""
        return self.parameters[parameter].take()


def _nothing() -> None:
    return None


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
