"""On every batch: each parameter's gradient is its layers' clipped one, and nothing else.

The guard watches one model in eager mode. In the forward pass it counts each layer's calls and
checks the batch dimension. In the backward pass it collects the sums that the layers' scopes
deliver, where nothing done to ``p.grad`` can change them. The graph has no other way to a
parameter: whatever arrives at one (a second use, a penalty in the loss,
``F.linear(x, layer.weight)``) is foreign, and refused.

Inside a graph traced by ``torch.compile`` none of this runs; what a graph has sent is released only
once the same way of calling the model has passed every check in eager mode (`Forms`).
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
    outside_forward,
    replaced_parameter,
    used_too_often,
)
from opacus_bpclip.guard.forms import Form, Forms
from opacus_bpclip.guard.gradient_checks import foreign_gradient, unusable_gradient
from opacus_bpclip.guard.parameters import GuardedParameters
from opacus_bpclip.guard.passes import MIXED, BackwardPasses
from opacus_bpclip.guard.precision import Roundings, backward_under_autocast, unfit
from opacus_bpclip.guard.ranks import Ranks
from opacus_bpclip.guard.watched import WatchedParameter
from opacus_bpclip.losses.criterion import LossWatch
from opacus_bpclip.model.coverage import (
    batch_normalization_problem,
    batch_normalizations,
)
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.replacements import mixes_examples
from opacus_bpclip.rules.precision import under_autocast


class GradientGuard:
    """Watch the trainable layers of one model.

    Args:
        model: the root module.
        layers: its trainable layers.
        whole: the parameters that layers compute with, by the sharded ones that the optimizer has.
        ranks: which train together; this one alone by default.

    Attributes:
        parameters: the model's, and what is collected for them.
        idle: whether the pass at hand has no examples, and is there for other ranks alone.
        violation: why the gradients at hand must not be used, or ``None``.
        refused: whether the optimizer has refused them.
        accumulated: how many backward passes the last gradients added up.
        passes: the backward passes that they came from.
        undoes_mean: whether the layers take gradients for those of a mean.
        loss: the watch of the criterion that every backward pass must come through, if any.
        forget: called when the gradients at hand are thrown away.
        joint: whether all layers share a budget, and a layer may be used any number of times.
        by_functions: the parameters that functions outside of layers with a rule are called on.
        forms: how the model was called.
        ran_compiled: whether a part of the latest forward pass ran as a compiled graph.
        rehearsing: whether nothing is to be collected: see `opacus_bpclip.guard.rehearsal`.
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
        self.ran_compiled = self.rehearsing = False
        self._in_forward = False
        self._batch_size = 0
        self._rows: int | Tensor = 0
        self._forward = 0  # the number of the latest forward pass
        self._calls: dict[str, int] = {}  # of each layer in the latest forward pass
        self.parameters = GuardedParameters(
            model, layers, whole or {}, self._refuse_foreign, self._check_arrival
        )
        self._roundings = Roundings(self.parameters.trained)

    def remove(self) -> None:
        """Stop watching."""
        self.parameters.remove()

    def clear(self) -> None:
        """Forget the gradients at hand: they have been used or thrown away."""
        self.violation = None
        self.refused = False
        self.passes.clear()
        self.forget()
        self.parameters.clear()

    def finish(self) -> None:
        """Forget the gradients at hand, and the forward pass that they came from."""
        self.accumulated = max(1, self.collected)
        self.clear()
        self.ran_compiled = False

    @property
    def pending(self) -> bool:
        """Return whether clipped gradients wait for their noise."""
        return self.collected > 0 or self.parameters.wait

    @property
    def collected(self) -> int:
        """Return how many backward passes the gradients at hand add up."""
        return max(self.parameters.arrivals, self.passes.collected)

    # Forward

    def enter_forward(self, batch_size: int, present: Tensor | None = None) -> None:
        """Begin a forward pass of the root over rows, of which some may be padding, not present."""
        self.require(self.ranks.problem())
        if self.undoes_mean:
            self.require(self._roundings.of_products(self.parameters.device))
        self.require(self.parameters.unfrozen())
        # Looked up anew: a module may have been put in the place of another.
        for name, norm in batch_normalizations(self._model).items():
            if mixes_examples(norm):
                self.fail(batch_normalization_problem(name, norm))
        self.ran_compiled = False
        self._calls.clear()
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
        if not self.joint and calls >= layer.uses:
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
        """Check that a layer made ``y`` with the parameters that are watched, in a fit dtype."""
        self.require(replaced_parameter(layer))
        self.check_precision(layer.name, y.dtype)

    def check_precision(self, name: str, dtype: torch.dtype) -> None:
        """Check that gradients of this dtype may come to a part of the model."""
        self.require(unfit(name, dtype, mean=self.undoes_mean))

    def check_rounding(self, output: object) -> None:
        """Check that no gradient of a mean goes through low precision, in a layer or between."""
        if self.undoes_mean:
            self.require(self._roundings.of_model(output))
            self._roundings.watch(output, self._batch_size, self.fail)

    # Backward

    def require(self, problem: str | None) -> None:
        """Do what `fail` does if there is a problem.

        Raises:
            PrivacyViolationError: there is.
        """
        if problem is not None:
            self.fail(problem)

    def fail(self, reason: str) -> None:
        """Make the gradients at hand unusable, and raise.

        Where other ranks wait for this one in the pass at hand, it goes on, for nothing: the next
        meeting of the ranks raises, before anything is released.

        Raises:
            PrivacyViolationError: the pass need not go on.
        """
        if not (self.ranks.in_pass and self.violation):
            self.violation = reason
        self.forget()
        self.ranks.refuse(reason)
        if self.ranks.in_pass:
            return
        raise PrivacyViolationError(reason)

    def begin_backward(self) -> Callable[[], None]:
        """Return what a scope of the latest forward pass calls when a gradient arrives."""
        return partial(self._begin_backward, self._forward, self._rows)

    def _begin_backward(self, forward: int, rows: int | Tensor) -> None:
        if self.idle:
            return
        if self.undoes_mean and under_autocast():
            self.fail(backward_under_autocast(compiled=False))
        self.require(self.passes.begin(forward, rows))
        self._check_mixed()

    def _check_mixed(self) -> None:
        if self.joint and self.passes.is_mixed:
            self.fail(MIXED)

    def collector(self) -> Callable[[Mapping[nn.Parameter, Tensor]], None]:
        """Return what a scope of the latest forward pass calls with its sums."""
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
            # A compiled graph calls such functions as they are: nothing in it is clipped.
            if form is not None and parameter not in self.by_functions:
                self.forms.confirm(form, watched)
        self.passes.collected = self.passes.count

    def _check_loss(self, watched: WatchedParameter) -> None:
        if self.loss is not None:
            self.require(self.loss.problem(watched.name))
        elif self.undoes_mean:
            self.require(LossWatch.other_criterion(watched.name))

    def _refuse_foreign(self, watched: WatchedParameter, _: Tensor) -> None:
        """Refuse a gradient that arrives at a parameter: those of layers do not."""
        self._check_loss(watched)
        self.fail(foreign_gradient(watched, graphs=self.ran_compiled or self.forms.have_graphs))

    def _check_arrival(self, watched: WatchedParameter, gradient: Tensor) -> None:
        """Check a sum that a compiled graph has sent."""
        self._check_loss(watched)
        if under_autocast():
            self.fail(backward_under_autocast(compiled=True))
        if self.undoes_mean:
            self.require(self._roundings.of_products(self.parameters.device))
        self.require(self.ranks.graphs_problem)
        self.require(unusable_gradient(watched, gradient))
        self.require(self.passes.note_traced())
        self._check_mixed()

    @property
    def arrived(self) -> list[WatchedParameter]:
        """Return the parameters whose gradients compiled graphs have sent since the last step."""
        return self.parameters.arrived

    def take(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the parameter's sum of contributions since the last step, ``None`` without any."""
        return self.parameters[parameter].take()


def _nothing() -> None:
    return None


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
