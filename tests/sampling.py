"""How the tests train on what a private loader has drawn, and what a refusal says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_bpclip import PrivacyViolationError
from tests.helpers import Private, make_private, mlp, values

NOTHING_DRAWN = (
    "The model trains on a batch of {rows} rows, but the data loader that make_private returned "
    "has drawn no batch that was not used yet: this one came from elsewhere, or it is used a "
    "second time. The accountant counts each step as a Poisson sample of its own, drawn by that "
    "loader. Iterate over the loader that make_private returned for this model, and take one step "
    "for each of its batches. If two models train on the same batches, put both in one module "
    "whose forward runs them, with one optimizer over both."
)
TOO_MANY = (
    "The model trains on a batch of {rows} rows, but the data loader sampled {items} items: an "
    "item has several rows, or some rows are not an item's (crops, augmented copies, generated "
    "examples). The bound holds for one row of each item; an item with several rows contributes "
    "several times as much. Make one row of each item in the dataset or collate_fn, and train on "
    "nothing but the loader's batch. For several views of each item, use "
    "opacus_bpclip.AugmentedViews and FoldViews."
)


def counted(model: nn.Module | None = None, **options: Any) -> Private:
    torch.manual_seed(3)
    return make_private(model or mlp(), counted=True, noise_multiplier=1.0, **options)


def train(private: Private, x: Tensor, y: Tensor) -> None:
    private.optimizer.zero_grad()
    F.cross_entropy(private.model(x), y).backward()
    private.optimizer.step()


def refused(private: Private, x: Tensor, y: Tensor, message: str) -> None:
    before, steps = values(private), private.steps
    with pytest.raises(PrivacyViolationError) as refusal:
        train(private, x, y)
    assert str(refusal.value) == message
    with pytest.raises(PrivacyViolationError, match="not covered by the guarantee"):
        private.optimizer.step()
    assert torch.equal(values(private), before)
    assert private.steps == steps
    private.optimizer.zero_grad()


def first(private: Private) -> tuple[Tensor, Tensor]:
    return next((x, y) for x, y in private.loader if len(x) > 2)


@contextmanager
def in_parts(*, manager: bool, workers: int) -> Iterator[tuple[Private, DataLoader[Any]]]:
    """Give what makes parts of at most 4 rows of samples of about 16."""
    torch.manual_seed(3)
    rows = None if manager else 4
    private = make_private(
        mlp(), counted=True, batch_size=16, noise_multiplier=1.0, physical_batch_size=rows
    )
    if workers:
        private.loader.num_workers, private.loader.prefetch_factor = workers, 2
    if not manager:
        yield private, private.loader
        return
    with BatchMemoryManager(
        data_loader=private.loader, max_physical_batch_size=4, optimizer=private.optimizer
    ) as loader:
        yield private, loader
