"""Numbers in the wrong precision."""

from __future__ import annotations

import pytest

from opacus_bpclip.clipping.scope import Scope
from opacus_bpclip.clipping.use import Sums, Use
from opacus_bpclip.guard import guard
from opacus_bpclip.guard.precision import Roundings
from tests.mutants import precision_killers as killers
from tests.mutants.registry import mutant

APART = "together and alone differ"
RELEASED = "nothing bounds was released"


@mutant(killed_by=killers.many_examples_in_low_precision, says=APART)
def sums_in_low_precision(patch: pytest.MonkeyPatch) -> None:
    """The sum over the batch is rounded to the model's precision, by more than one example's
    contribution."""
    add = Scope._add

    def rounded(self: Scope, use: Use, sums: Sums) -> None:
        add(self, use, {name: total.bfloat16().float() for name, total in sums.items()})

    patch.setattr(Scope, "_add", rounded)


@mutant(killed_by=killers.mean_under_autocast, says=RELEASED)
def rounded_mean_let_through(patch: pytest.MonkeyPatch) -> None:
    """A mean's gradients are rounded to bfloat16 after the division by a private number."""
    patch.setattr(guard, "unfit", lambda name, dtype, mean: None)
    patch.setattr(Roundings, "problem", lambda *args: None)


@mutant(killed_by=killers.mean_of_rounded_products, says=RELEASED)
def rounded_products_let_through(patch: pytest.MonkeyPatch) -> None:
    """Nobody looks whether products of float32 numbers are rounded to fewer bits."""
    patch.setattr(guard, "rounded_products", lambda device: None)


@mutant(killed_by=killers.mean_rounded_between_layers, says=RELEASED)
def roundings_between_layers_not_looked_for(patch: pytest.MonkeyPatch) -> None:
    """Only what layers make is looked at, not what is between them."""
    patch.setattr(Roundings, "problem", lambda *args: None)
