"""Killers of mutants of the way from the loader to the step: rows of no sampled batch."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader, Subset, TensorDataset

from opacus_bpclip.rules import RULES, BroadcastRule
from opacus_bpclip.sampling.collating import problem_of_collating
from opacus_bpclip.sampling.items import sampled_items
from opacus_bpclip.sampling.records import Pass
from tests.budgets import layerwise
from tests.checks import Trainer, check_refused
from tests.refusals import check_raises


def _sampled() -> tuple[Trainer, Tensor]:
    """Return a trainer whose loader has drawn a batch of three, and six rows."""
    torch.manual_seed(0)
    trainer = Trainer(nn.Sequential(nn.Linear(2, 2)), (2,), layerwise())
    trainer.model._sample_from(trainer.loader.samples)
    trainer.loader.samples.draw(3, Pass())
    return trainer, torch.ones(6, 2).double()


def more_rows_than_items() -> None:
    """Six rows, where the loader has drawn three items."""
    trainer, x = _sampled()
    check_refused(trainer, x, lambda y, _: y.sum())


def batch_used_twice() -> None:
    """A second step on the same batch."""
    trainer, x = _sampled()
    trainer.model(x[:3]).sum().backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    check_refused(trainer, x[:3], lambda y, _: y.sum())


def two_samples_in_one_step() -> None:
    """A step that `signal_skip_step` makes of two samples."""
    trainer, x = _sampled()
    trainer.optimizer.signal_skip_step(True)
    trainer.model(x[:2]).sum().backward()
    trainer.optimizer.step()
    trainer.loader.samples.draw(3, Pass())
    trainer.optimizer.signal_skip_step(False)
    check_refused(trainer, x[:1], lambda y, _: y.sum())


def part_without_announcement() -> None:
    """A further part of a sample, where `signal_skip_step` announced only the first one."""
    trainer, x = _sampled()
    trainer.optimizer.signal_skip_step(True)
    trainer.model(x[:2]).sum().backward()
    trainer.optimizer.step()
    check_refused(trainer, x[:1], lambda y, _: y.sum())


def two_open_iterators() -> None:
    """A step while two iterators over the loader are open, each with a batch that had no step."""
    trainer, x = _sampled()
    log = trainer.loader.samples
    for skip in (True, False):
        opened = log.begin()
        log.draw(3, opened)
        log.signal(skip)
    check_refused(trainer, x[:2], lambda y, _: y.sum())


def group_of_two_ranks() -> None:
    """A process group of two ranks, made after `make_private`."""
    trainer, x = _sampled()
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        check_refused(trainer, x[:3], lambda y, _: y.sum())
    finally:
        dist.destroy_process_group()


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class _ScaleRule(BroadcastRule):
    parameters = ("scale",)
    dims: ClassVar = {"scale": 3}


def scale_of_another_axis() -> None:
    """A broadcast rule for three axes, on four, the second as long as the batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RULES, _Scale, _ScaleRule)
        trainer = Trainer(nn.Sequential(_Scale()), (3, 3, 2), layerwise())
        check_refused(trainer, torch.ones(3, 3, 3, 2).double(), lambda y, _: y.sum())


def all_items_in_one_row() -> None:
    """A collate function that puts all items one after the other into one row."""
    packed = DataLoader([torch.ones(3)] * 8, collate_fn=lambda items: torch.cat(items)[None])
    assert problem_of_collating(packed, axis=0), "a row of all items was accepted"


def rows_of_the_whole_batch() -> None:
    """A collate function that divides the rows by the largest number in the batch."""
    data = list(torch.arange(1.0, 9.0)[:, None])
    loader = DataLoader(data, collate_fn=lambda own: torch.stack(own) / torch.stack(own).max())
    assert problem_of_collating(loader, axis=0), "a row that depends on others was accepted"


def one_item_ten_times() -> None:
    """A data set of eight items, with the first one nine times more."""
    data = TensorDataset(torch.arange(8.0))
    loader = DataLoader(Subset(data, [*range(8), *[0] * 9]), batch_size=4)
    check_raises(
        lambda: sampled_items(loader),
        "more than once",
        otherwise="an item that is there ten times was accepted",
    )
