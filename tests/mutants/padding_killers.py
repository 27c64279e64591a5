"""Killers of mutants of rows that fill a batch up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping
from opacus_bpclip.sampling.records import Pass
from tests.checks import HUGE, Trainer, check_independence, check_refused, check_sensitivity
from tests.padding.padded import Padded


def padding_against_an_example() -> None:
    """One example against none, among rows whose gradient is as large and has the other sign."""
    trainer = Padded(nn.Linear(1, 1), (1,), BackpropClipping(), rows=1, fill=-HUGE)
    x = torch.full((1, 1), 1e-3).double()
    check_sensitivity(trainer, x, torch.full_like(x, HUGE))


def small_examples_among_padding() -> None:
    """Examples below the limit, together and one by one, in batches of four rows."""
    trainer = Padded(nn.Linear(1, 1), (1,), BackpropClipping(), rows=4)
    x = torch.tensor([[0.1], [0.2], [0.3]]).double()
    check_independence(trainer, x, torch.full_like(x, 0.1))


def _sampled(*items: int) -> tuple[Trainer, Tensor]:
    """Return a trainer whose loader has drawn samples, a physical batch of the first of which is
    announced, and four rows, none of zeros."""
    torch.manual_seed(0)
    trainer = Trainer(nn.Sequential(nn.Linear(2, 2)), (2,), BackpropClipping())
    samples = trainer.loader.samples
    trainer.model._sample_from(samples)
    samples.is_padded = True
    drawn = Pass()
    for index, count in enumerate(items):
        samples.draw(count, drawn)
        if not index:
            samples.signal(False)
    return trainer, torch.ones(4, 2).double()


def padding_that_is_not_zero() -> None:
    """Four rows, where the loader has drawn three items and padded with rows that are not zero."""
    trainer, x = _sampled(3)
    check_refused(trainer, x, lambda y, _: y.sum())


def padding_behind_another_sample() -> None:
    """The same, while a sample of five items waits."""
    trainer, x = _sampled(3, 5)
    check_refused(trainer, x, lambda y, _: y.sum())
