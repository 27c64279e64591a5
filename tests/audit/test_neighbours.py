"""Which neighbours are tried without noise."""

from __future__ import annotations

import pytest
import torch

from opacus_bpclip.audit import Target
from opacus_bpclip.audit.neighbours import search
from tests.audit.mechanisms import ENTRIES, Gaussian, target
from tests.audit.test_mechanisms import large_negative_entries_get_past_the_clip


def test_the_search_finds_what_the_targets_own_canaries_do_not_show():
    wrong = target(clipped=large_negative_entries_get_past_the_clip)
    found, canary = search(wrong, seed=0)
    assert found.change > 100
    assert "a made-up example" in found.where
    assert not torch.equal(canary[0], wrong.canaries[0][0])


def test_a_target_without_canaries_has_its_own_examples_tried():
    whole = target()
    found, _ = search(Target(whole.name, whole.make, whole.batches), seed=0, searches=0)
    assert found.pairs == 2 * len(whole.batches[0][0])
    assert "example" in found.where


def test_examples_of_ids_are_only_rearranged():
    class Counts(Gaussian):
        def compute(self, batch):
            (ids,) = batch
            assert set(ids.unique().tolist()) <= {0, 1, 2, 3, 4}
            self.rows = torch.zeros(len(ids), ENTRIES).scatter_add(1, ids, torch.ones(ids.shape))

    ids = torch.tensor([[0, 1, 4], [2, 2, 3]])
    found, _ = search(Target("ids", Counts, ((ids,),)), seed=0)
    assert found.violations == ()
    assert found.change == pytest.approx(1.0)
