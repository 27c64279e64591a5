"""Numbers in the wrong precision."""

from __future__ import annotations

import pytest

from opacus_bpclip import hooks
from opacus_bpclip.clipping import functions, layers
from opacus_bpclip.clipping.scope import Scope
from opacus_bpclip.clipping.use import Sums, Use
from opacus_bpclip.guard import precision
from opacus_bpclip.guard.precision import Roundings
from opacus_bpclip.optimizer import optimizer
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
    patch.setattr(precision, "unfit", lambda name, dtype, mean: None)
    patch.setattr(Roundings, "of_model", lambda *args: None)


@mutant(killed_by=killers.mean_of_very_many, says=RELEASED)
def mean_of_many_let_through(patch: pytest.MonkeyPatch) -> None:
    """A plain mean in float32 sums so many examples at once that its rounding adds up to one."""
    patch.setattr(optimizer, "rounded_sums", lambda *args: None)


@mutant(killed_by=killers.mean_of_rounded_products, says=RELEASED)
def rounded_products_let_through(patch: pytest.MonkeyPatch) -> None:
    """It is not checked whether products of float32 numbers are rounded to fewer bits."""
    patch.setattr(Roundings, "of_parameters", lambda *args: None)


@mutant(killed_by=killers.option_of_a_model_cast_later, says=RELEASED)
@mutant(killed_by=killers.option_behind_a_rounded_loss, says=RELEASED)
def options_in_single_precision_let_through(patch: pytest.MonkeyPatch) -> None:
    """Whether options have the precision that they need behind a plain mean is asked in
    `make_private` only."""
    patch.setattr(hooks, "rounded_option", lambda *args: None)


@mutant(killed_by=killers.own_layer_that_rounds, says=APART)
def layers_own_casts_not_looked_for(patch: pytest.MonkeyPatch) -> None:
    """A layer's own graph adds up gradients in whatever dtype the layer converts them to."""
    patch.setattr(layers, "low_precision_behind", lambda *args: None)


@mutant(killed_by=killers.mean_of_a_rounded_parameter, says=RELEASED)
def roundings_of_parameters_not_looked_for(patch: pytest.MonkeyPatch) -> None:
    """Values computed from parameters alone may round a mean's gradients on their way back."""
    patch.setattr(functions._Following, "_check_rounding", lambda *args: None)


@mutant(killed_by=killers.mean_rounded_between_layers, says=RELEASED)
def roundings_between_layers_not_looked_for(patch: pytest.MonkeyPatch) -> None:
    """Only the layers' outputs are checked, and not the operations between them."""
    patch.setattr(Roundings, "of_model", lambda *args: None)
