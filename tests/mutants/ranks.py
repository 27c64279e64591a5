"""Several ranks: what they add up, who draws the noise, and on whose items each trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from opacus_bpclip.engine import sources
from opacus_bpclip.guard.ranks import Place, Ranks
from opacus_bpclip.guard.seeds import Purpose
from opacus_bpclip.optimizer import optimizer
from opacus_bpclip.sampling import loader
from tests.mutants import ranks_killers as killers
from tests.mutants.registry import mutant


@mutant(killed_by=killers.noise_of_two_ranks, says=r"follow its law: its scale is (1\.99|2\.0)")
def noise_of_every_rank(patch: pytest.MonkeyPatch) -> None:
    """Every rank adds noise to its own sum: the release has more noise than is claimed and
    accounted for."""
    released = optimizer.released

    def as_rank_0(sums: Any, parameters: Any, ranks: Ranks, *noise: Any) -> list[Tensor]:
        return released(sums, parameters, Ranks(ranks.size, 0), *noise)

    patch.setattr(optimizer, "released", as_rank_0)


@mutant(killed_by=killers.noise_of_two_shards, says="correlated over parameters: by 1.000")
@mutant(killed_by=killers.samples_of_two_ranks, says="two items are drawn together")
def ranks_seeded_alike(patch: pytest.MonkeyPatch) -> None:
    """Generators with equal seeds draw equal numbers: noise in two shards cancels in their
    difference, and two items are always sampled together."""

    def seed(self: Ranks, generator: torch.Generator | None, purpose: Purpose) -> int:
        return 17

    patch.setattr(Ranks, "seed_of_rank", seed)


@mutant(killed_by=killers.seeds_of_two_shards, says="two generators are seeded alike")
def purposes_seeded_alike(patch: pytest.MonkeyPatch) -> None:
    """If the user's generators have the same seed, a rank's noise and its sample come from the same
    numbers: one reveals the other."""
    seed_of_rank = Ranks.seed_of_rank

    def seed(self: Ranks, generator: torch.Generator | None, purpose: Purpose) -> int:
        return seed_of_rank(self, generator, Purpose.SAMPLING)

    patch.setattr(Ranks, "seed_of_rank", seed)
    # An engine would find it, too.
    patch.setattr(sources, "are_alike", lambda one, other: False)


@mutant(killed_by=killers.sum_of_two_ranks, says="the sum of two ranks is off by")
def sum_divided_by_ranks(patch: pytest.MonkeyPatch) -> None:
    """The ranks' sums are averaged, as in ordinary data parallel training, and also divided by the
    batch size of all ranks."""
    released = optimizer.released

    def averaged(sums: Any, parameters: Any, ranks: Ranks, *noise: Any) -> list[Tensor]:
        return released([s / ranks.size for s in sums], parameters, ranks, *noise)

    patch.setattr(optimizer, "released", averaged)


@mutant(killed_by=killers.refusal_of_one_rank, says="rank 0 stepped on, while rank 1 refused")
def refusal_not_agreed(patch: pytest.MonkeyPatch) -> None:
    """Each rank reacts only to its own refusal: the others release a step, or wait for ever."""

    def alone(self: Ranks, place: Place, *_: Any, refusal: str | None = None, **__: Any) -> Any:
        return refusal

    patch.setattr(Ranks, "meet", alone)


@mutant(killed_by=killers.samples_of_two_ranks, says="an item is on both ranks")
def items_of_every_rank(patch: pytest.MonkeyPatch) -> None:
    """Each rank samples from the whole data set: an example may be in two local batches of one
    step, and contribute twice."""
    patch.setattr(loader, "part_of_rank", range)


@mutant(killed_by=killers.step_that_one_rank_lacks, says="though one lacks a step")
def steps_that_a_rank_lacks_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A rank whose step has failed where the others have taken theirs goes on with them, from other
    parameters, and its accountant has fewer steps."""
    patch.setattr(Ranks, "leave", lambda self, reason: None)
