"""A logical batch may be computed in parts: one draw of noise, one entry, the same sum."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from opacus_bpclip import PrivacyViolationError
from tests.helpers import (
    Private,
    backward,
    dataset,
    loss_of,
    make_private,
    mlp,
    seeded,
    step_on,
    summed,
    train_step,
    values,
)


def physical_batches(private: Private, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    with BatchMemoryManager(
        data_loader=private.loader, max_physical_batch_size=size, optimizer=private.optimizer
    ) as loader:
        yield from loader


@pytest.mark.parametrize("clear", ["always", "once per logical batch"])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_physical_batches_add_up_to_the_logical_batch(size: int, clear: str) -> None:
    whole = seeded(poisson_sampling=False)
    parts = seeded(poisson_sampling=False)
    for x, y in whole.loader:
        step_on(whole, x, y)
    steps = 0
    fresh = True
    for x, y in physical_batches(parts, size):
        assert len(x) <= size
        if clear == "always" or fresh:
            parts.optimizer.zero_grad()
        loss_of(parts.model, x, y).backward()
        parts.optimizer.step()
        fresh = not parts.optimizer._is_last_step_skipped
        steps += fresh
    assert steps == 4
    # The same draws of noise: one for each logical batch.
    torch.testing.assert_close(values(parts), values(whole))
    assert parts.engine.accountant.history == whole.engine.accountant.history == [(1.3, 0.25, 4)]


@pytest.mark.parametrize("ends", ["step", "zero_grad", "refused"])
def test_what_is_frozen_within_a_logical_batch_is_in_no_later_one(ends: str) -> None:
    private = make_private(mlp(), lr=0.0)
    frozen = private.handle._module[0]
    private.optimizer.signal_skip_step(do_skip=True)
    train_step(private)
    assert all(p.summed_grad.any() for p in frozen.parameters())
    frozen.requires_grad_(False)
    private.optimizer.signal_skip_step(do_skip=False)
    private.optimizer.zero_grad()
    backward(private)
    if ends == "refused":
        private.parameters[-1].register_hook(lambda _: None)
        with pytest.raises(PrivacyViolationError):
            private.parameters[-1].sum().backward()
        private.optimizer.zero_grad()
    else:
        private.optimizer.step()
    if ends == "zero_grad":
        private.optimizer.zero_grad()
    assert all(p.summed_grad is None for p in frozen.parameters())
    frozen.requires_grad_(True)
    train_step(private)
    fresh = make_private(mlp(), lr=0.0)
    fresh.handle.load_state_dict(private.handle.state_dict())
    train_step(fresh)
    assert torch.equal(summed(private), summed(fresh))


def test_poisson_batches_may_be_split_too_and_empty_ones_still_step() -> None:
    torch.manual_seed(0)
    private = make_private(mlp(), data=dataset(6), batch_size=1, noise_multiplier=1.0)
    sizes = []
    for _ in range(10):
        for x, y in physical_batches(private, 1):
            sizes.append(len(x))
            step_on(private, x, y)
    assert 0 in sizes
    assert private.steps == 10 * len(private.loader)
    assert len(sizes) > private.steps


def test_a_skipped_step_moves_nothing_and_is_not_accounted() -> None:
    private = seeded()
    before = values(private)
    private.optimizer.signal_skip_step(do_skip=True)
    train_step(private)
    assert torch.equal(values(private), before)
    assert private.steps == 0
    assert all(p.grad is None for p in private.parameters)
    with pytest.raises(PrivacyViolationError, match="in the middle of a logical batch"):
        private.optimizer.max_grad_norm = 0.1


def one_hot_examples(size: int) -> Private:
    """Example i touches column i of the weight alone: the sum tells who is in it."""
    data = TensorDataset(torch.eye(size), torch.zeros(size, dtype=torch.long))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(size, 2, bias=False))
    return make_private(model, data=data, batch_size=size // 2, poisson_sampling=False)


@pytest.mark.parametrize("recover", ["zero_grad at once", "zero_grad with the next batch"])
@pytest.mark.parametrize("call_step", [True, False], ids=["step refuses, too", "step not called"])
@pytest.mark.parametrize("where", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_refused_physical_batches_never_let_two_logical_batches_into_one_step(
    where: tuple[int, ...], call_step: bool, recover: str
) -> None:
    # One example may be in both: it would contribute twice to a single accounted step.
    private = one_hot_examples(12)
    present = []
    for index, (x, y) in enumerate(physical_batches(private, 2)):
        private.optimizer.zero_grad()
        loss = loss_of(private.model, x, y)
        if index in where:
            with pytest.raises(PrivacyViolationError):
                (loss + private.parameters[0].sum()).backward()
            if call_step:
                with pytest.raises(PrivacyViolationError):
                    private.optimizer.step()
            if recover == "zero_grad at once":
                private.optimizer.zero_grad()
            continue
        loss.backward()
        private.optimizer.step()
        if not private.optimizer._is_last_step_skipped:
            present.append(private.parameters[0].summed_grad.norm(dim=0) > 0)
    assert 1 <= len(present) <= 2
    assert not any(bool(step[:6].any() and step[6:].any()) for step in present)
    assert present[-1][6:].all()


@pytest.mark.parametrize("where", [0, 1], ids=["first", "last"])
def test_a_physical_batch_that_is_repeated_after_a_refusal_counts_once(where: int) -> None:
    private = one_hot_examples(4)
    contribution = 1.0 + 1e-6
    for index, (x, y) in enumerate(physical_batches(private, 1)):
        private.optimizer.zero_grad()
        if index == where:
            with pytest.raises(PrivacyViolationError):
                (loss_of(private.model, x, y) + private.parameters[0].sum()).backward()
            private.optimizer.zero_grad()
        loss_of(private.model, x, y).backward()
        private.optimizer.step()
        counted = private.parameters[0].summed_grad.norm(dim=0)
        assert counted[index] > 0
        assert counted.max() <= contribution
