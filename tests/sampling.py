"""How the tests train on what a private loader has drawn, and what a refusal says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    "nothing but the loader's batch."
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
