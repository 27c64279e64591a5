"""Functions on parameters, measured for the wrong example, or in part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from opacus_bpclip.clipping import function_rules, function_use, functions
from opacus_bpclip.clipping.scope import Scope
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.model.plan import Template
from opacus_bpclip.probe import functions as trials
from opacus_bpclip.probe import order_of_functions
from tests.mutants import function_killers as killers
from tests.mutants.registry import MOVED, mutant

RELEASED = "nothing bounds was released"
APART = "differs from flat clipping"
FOUND = "was not found|were not found"


def _with_other_places(patch: pytest.MonkeyPatch, change: Any) -> None:
    found = functions._Following._template

    def changed(self: Any, call: Any) -> Template | None:
        template = found(self, call)
        if template is None:
            return None
        return template._replace(
            arguments=tuple(map(change, template.arguments)),
            outputs=tuple(map(change, template.outputs)),
        )

    patch.setattr(functions._Following, "_template", changed)


@mutant(killed_by=killers.batch_on_the_second_axis, says=APART)
def batch_taken_for_the_first_axis(patch: pytest.MonkeyPatch) -> None:
    """The batch is assumed to be the first axis, which is that of time steps."""
    _with_other_places(patch, lambda place: place and place._replace(axis=0))


@mutant(killed_by=killers.rows_folded_with_other_axes, says=APART)
def fold_read_the_other_way_round(patch: pytest.MonkeyPatch) -> None:
    """Entries of an example that are a stride apart are treated as neighbours."""
    _with_other_places(patch, lambda place: place and place._replace(inner=False))


@mutant(killed_by=killers.derived_tensor_in_the_loss, says=RELEASED)
def way_around_not_refused(patch: pytest.MonkeyPatch) -> None:
    """A gradient that reaches a parameter beside the nodes is dropped in silence: what the user
    asks for is not what is trained, and nothing says so."""
    patch.setattr(functions, "_refuse_way_around", lambda *_: None)


@mutant(killed_by=killers.scale_of_every_example, says=APART)
def copy_shared_by_two_examples(patch: pytest.MonkeyPatch) -> None:
    """Two examples share one copy of the parameter: each is measured by the gradient of both."""
    make = function_use.own_gradients

    def shared(*args: Any) -> Any:
        own = make(*args)

        def of(rows: slice) -> tuple[Tensor, ...]:
            return tuple(g + g.roll(1, 0) for g in own(rows))

        return of

    patch.setattr(function_use, "own_gradients", shared)


@mutant(killed_by=killers.linear_function_with_bias, says="joint" + MOVED)
def bias_of_a_function_not_measured(patch: pytest.MonkeyPatch) -> None:
    """Of a linear function only the weight's gradient is measured; the bias's is added up, too."""
    rule_of_call = function_rules.rule_of_call

    def without(*args: Any) -> Any:
        ruled = rule_of_call(*args)
        if ruled is None:
            return None
        return ruled._replace(rule=replace(ruled.rule, bias=False))

    patch.setattr(function_use, "rule_of_call", without)


@mutant(killed_by=killers.parameter_used_by_two_functions, says=APART)
def last_function_taken_for_all(patch: pytest.MonkeyPatch) -> None:
    """Of several functions on one parameter only one is measured, but all are added up."""
    enter = Scope.enter

    def once(self: Scope, layer: Layer, group: str) -> None:
        enter(self, layer, group)
        self._calls[group] = 1

    patch.setattr(Scope, "enter", once)


@mutant(killed_by=killers.weight_computed_from_parameters, says=APART)
def weight_measured_before_it_is_sent_back(patch: pytest.MonkeyPatch) -> None:
    """The gradient of a weight that is computed from a parameter is measured in the place of the
    parameter's gradient."""

    def as_it_is(value: Tensor, own: Tensor, *, batched: bool) -> Sequence[Tensor]:
        return [own]

    patch.setattr(function_use, "sent_back", as_it_is)


@mutant(killed_by=killers.rows_turned_round, says=FOUND)
def order_of_functions_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    """The rows of a function are not compared with the examples."""
    patch.setattr(trials, "narrow", lambda *args: None)
    patch.setattr(trials, "check_replayed", lambda *args: None)


@mutant(killed_by=killers.copies_turned_round, says=FOUND)
def copies_taken_for_the_examples_own(patch: pytest.MonkeyPatch) -> None:
    """For results that are equal for all examples, it is not checked to which example each row
    goes."""
    patch.setattr(order_of_functions, "_outputs_stay", lambda *args: True)
