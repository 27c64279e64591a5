"""The noise-free check convicts sums that one example moves too far, wherever that shows."""

from __future__ import annotations

import pytest
import torch

from opacus_bpclip.audit import Target, audit
from opacus_bpclip.audit.neighbours import NeighbourSearch
from tests.audit.mechanisms import ENTRIES, Gaussian, convicted, target


class ClippedTooHigh(Gaussian):
    def clipped(self):
        return super().clipped() * 1.01


class ClippedTogether(Gaussian):
    """One factor for the whole batch: one example decides how much the others count."""

    def clipped(self):
        return self.rows / max(1.0, float(self.rows.norm()) if len(self.rows) else 1.0) * 3


def test_neighbours_convict_a_bound_that_is_one_percent_off():
    text = convicted(ClippedTooHigh)
    assert text.startswith("one example moves the sum by 1.01 times the claimed sensitivity (")


def test_neighbours_convict_coupling_among_the_examples():
    assert "times the claimed sensitivity" in convicted(ClippedTogether)


class SpoiledBySize(Gaussian):
    def clipped(self):
        large = bool((self.rows.abs() > 1e3).any())
        return super().clipped() * (torch.nan if large else 1)


def test_neighbours_convict_a_sum_that_is_not_finite():
    assert convicted(SpoiledBySize).startswith("one example moves the sum by inf times")


def test_the_search_finds_what_the_targets_own_canaries_do_not_show():
    class WrongWayRound(Gaussian):
        """Only large negative entries get past the clip."""

        def clipped(self):
            return self.rows / self.rows.clamp(min=0).norm(dim=1, keepdim=True).clamp(min=1)

    found = NeighbourSearch(target(WrongWayRound), seed=0)
    assert found.result.change > 100
    assert "a made-up example" in found.result.where
    assert not torch.equal(found.canary[0], target().canaries[0][0])


def test_a_target_without_canaries_has_its_own_examples_tried():
    whole = target()
    bare = Target(whole.name, whole.make, whole.batches)
    found = NeighbourSearch(bare, seed=0, searches=0)
    assert found.result.pairs == 2 * len(whole.batches[0][0])
    assert "example" in found.result.where


def test_examples_of_ids_are_only_rearranged():
    class Counts(Gaussian):
        def compute(self, batch):
            (ids,) = batch
            assert ids.unique().tolist() == sorted(set(ids.unique().tolist()) & {0, 1, 2, 3, 4})
            self.rows = torch.zeros(len(ids), ENTRIES).scatter_add(1, ids, torch.ones(ids.shape))

    ids = torch.tensor([[0, 1, 4], [2, 2, 3]])
    found = NeighbourSearch(Target("ids", Counts, ((ids,),)), seed=0)
    assert found.result.violations == ()
    assert found.result.change == pytest.approx(1.0)


def test_a_worst_case_that_falls_short_is_a_doubt():
    class HalfUsed(Gaussian):
        def clipped(self):
            return super().clipped() / 2

    verdict = audit(target(HalfUsed), trials=0)
    assert verdict.outcome == "asleep"
    assert verdict.doubts == ("the worst case reaches only 0.5 of the sensitivity",)
    # Nobody promised that it would be reached.
    assert audit(target(HalfUsed, attained=False), trials=0).outcome == "pass"
