"""Compiled graphs that were not checked in eager mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from opacus_bpclip.guard.forms import Forms, Unchecked
from opacus_bpclip.guard.watched import WatchedParameter
from opacus_bpclip.optimizer import optimizer
from tests.mutants import compiled_killers as killers
from tests.mutants.registry import mutant

RELEASED = "nothing bounds was released"


@mutant(killed_by=killers.roundings_in_a_graph, says=RELEASED)
def graphs_not_checked(patch: pytest.MonkeyPatch) -> None:
    """A compiled graph's gradients are released without a check of such a pass in eager mode."""
    patch.setattr(optimizer, "check_graphs", lambda model, guard: None)


@mutant(killed_by=killers.graph_behind_another_one, says=RELEASED)
def latest_form_checked_for_all(patch: pytest.MonkeyPatch) -> None:
    """Only the form in which the model was traced last is rehearsed, and the gradient may be from a
    call in another form."""
    unchecked = Forms.unchecked

    def latest(self: Forms, arrived: Iterable[WatchedParameter]) -> Iterator[Unchecked]:
        return (each for each in unchecked(self, arrived) if each.form is list(self._traced)[-1])

    patch.setattr(Forms, "unchecked", latest)
