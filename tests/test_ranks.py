"""Ranks that were not made private together are refused: they would train apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from opacus_bpclip import PrivacyViolationError
from tests.helpers import backward, make_private, mlp, train_step

REFUSAL = (
    "This process is one of 2, and the model was made private for 1: each rank would sample, add "
    "noise and step on its own, and their models would drift apart while the accountant sees one "
    "of them. Wrap the model before make_private: "
    "DifferentiallyPrivateDistributedDataParallel(model) of opacus.distributed, or "
    "fully_shard(model) of torch.distributed.fsdp. Or train in one process (torchrun "
    "--nproc-per-node 1, or no process group)."
)


@contextmanager
def process_group(ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_a_model_on_several_ranks_is_refused_before_training() -> None:
    with process_group(2), pytest.raises(ValueError, match="one of 2") as refusal:
        make_private(mlp())
    assert str(refusal.value) == REFUSAL


def test_a_process_group_that_is_made_later_is_refused_on_the_batch() -> None:
    private = make_private(mlp())
    train_step(private)
    private.optimizer.zero_grad()
    with process_group(2), pytest.raises(PrivacyViolationError) as refusal:
        backward(private)
    assert str(refusal.value) == REFUSAL


def test_a_model_that_is_wrapped_after_make_private_is_refused_on_the_batch() -> None:
    private = make_private(mlp())
    with process_group(2):
        wrapped = private._replace(model=DistributedDataParallel(private.model))
        with pytest.raises(PrivacyViolationError) as refusal:
            backward(wrapped)
    assert str(refusal.value) == REFUSAL


def test_one_rank_trains() -> None:
    with process_group(1):
        train_step(make_private(mlp()))
