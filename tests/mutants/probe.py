"""Trial runs that do not find what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from opacus_bpclip.probe import copies, ragged, values
from tests.mutants import probe_killers
from tests.mutants.registry import mutant


@mutant(killed_by=probe_killers.mean_over_labels_that_count, says="was not found")
def labels_all_count(patch: pytest.MonkeyPatch) -> None:
    """Made-up labels ignore no position: a loss that divides by the number of labels that count
    looks like a mean over the examples."""
    patch.setattr(ragged, "padded", lambda batch: None)


@mutant(killed_by=probe_killers.mean_over_labels_that_count, says="was not found")
def examples_equally_long(patch: pytest.MonkeyPatch) -> None:
    """Each made-up example ignores the same number of positions."""

    def halves(leaf: Tensor, axis: int) -> Tensor:
        length = leaf.shape[-1]
        return torch.arange(length) < length // 2

    patch.setattr(ragged, "kept_positions", halves)


@mutant(killed_by=probe_killers.mean_weighted_by_class, says="was not found")
def classes_halved_evenly(patch: pytest.MonkeyPatch) -> None:
    """Both halves of the made-up examples have equally many labels of each class, so the sum of the
    class weights is the same in both."""
    drawn = values._drawn

    def even(shape: tuple[int, ...], like: Tensor, *rest: Any) -> Tensor:
        if like.is_floating_point():
            return drawn(shape, like, *rest)
        flags = torch.tensor([1, 0, 0, 1]).view(-1, *[1] * (len(shape) - 1))
        return flags.expand(shape).to(like)

    patch.setattr(values, "_drawn", even)


@mutant(killed_by=probe_killers.module_under_two_names, says="was left changed")
def substitutes_stay(patch: pytest.MonkeyPatch) -> None:
    """The model keeps the copies of the trial runs, in double precision, and trains those, which
    are not watched."""
    patch.setattr(copies.Substitutes, "__exit__", lambda self, *error: None)
