"""Compiled graphs that nobody has vouched for."""

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
def graphs_not_vouched_for(patch: pytest.MonkeyPatch) -> None:
    """What a compiled graph sends is released, though eager mode has never seen such a pass."""
    patch.setattr(optimizer, "check_graphs", lambda model, guard: None)


@mutant(killed_by=killers.graph_behind_another_one, says=RELEASED)
def latest_form_vouches_for_all(patch: pytest.MonkeyPatch) -> None:
    """Only the way in which the model was traced last is rehearsed, and the gradient may be of a
    call before."""
    unchecked = Forms.unchecked

    def latest(self: Forms, arrived: Iterable[WatchedParameter]) -> Iterator[Unchecked]:
        return (each for each in unchecked(self, arrived) if each.form is list(self._traced)[-1])

    patch.setattr(Forms, "unchecked", latest)
