"""A step is of one batch that the private loader has drawn, each item one row, used once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_bpclip import PrivacyViolationError
from opacus_bpclip.sampling.problems import TWO_SAMPLES
from tests.helpers import dataset, make_private, mlp
from tests.sampling import NOTHING_DRAWN, TOO_MANY, counted, first, refused, train


def prefetched(loader: DataLoader[Any]) -> Iterator[Any]:
    """Read one batch ahead, as accelerate does, over the end of the epoch."""
    held: list[Any] = []
    for _ in range(2):
        for batch in loader:
            held.append(batch)
            if len(held) > 1:
                yield held.pop(0)
    yield from held


def one_at_a_time(loader: DataLoader[Any]) -> Iterator[Any]:
    for _ in range(6):
        yield next(iter(loader))


def evaluated_between(loader: DataLoader[Any]) -> Iterator[Any]:
    for index, batch in enumerate(loader):
        yield batch
        if index % 2:
            assert sum(len(x) for x, _ in loader) > 0


def some_left_out(loader: DataLoader[Any]) -> Iterator[Any]:
    for index, batch in enumerate(loader):
        if index % 3:
            yield batch


def made_anew(loader: DataLoader[Any]) -> Iterator[Any]:
    """Read a loader that somebody made of the private one's parts."""
    yield from DataLoader(
        loader.dataset, batch_sampler=loader.batch_sampler, collate_fn=loader.collate_fn
    )


@pytest.mark.parametrize(
    "read",
    [iter, list, prefetched, one_at_a_time, evaluated_between, some_left_out, made_anew],
)
def test_each_batch_may_be_read_in_any_way_and_trained_on_once(
    read: Callable[[Iterable[Any]], Iterable[Any]],
) -> None:
    private = counted()
    steps = 0
    for _ in range(3):
        for x, y in read(private.loader):
            train(private, x, y)
            steps += 1
    assert private.steps == steps >= 6
    if read not in (some_left_out, evaluated_between):  # which leave batches that wait
        refused(private, *dataset()[:4], NOTHING_DRAWN.format(rows=4))


@pytest.mark.parametrize("workers", [0, 2])
def test_physical_batches_of_one_sample_make_one_step(workers: int) -> None:
    private = make_private(mlp(), counted=True, batch_size=16, noise_multiplier=1.0)
    if workers:
        torch.manual_seed(3)
        private.loader.num_workers, private.loader.prefetch_factor = workers, 2
    for epoch in range(1, 3):
        with BatchMemoryManager(
            data_loader=private.loader, max_physical_batch_size=5, optimizer=private.optimizer
        ) as loader:
            for x, y in loader:
                train(private, x, y)
        assert private.steps == epoch * len(private.loader)


def test_parts_of_a_batch_by_hand_make_one_step() -> None:
    private = counted()
    for x, y in private.loader:
        for part in (slice(0, 3), slice(3, None)):
            private.optimizer.signal_skip_step(part.start == 0)
            train(private, x[part], y[part])
    assert private.steps == len(private.loader)


def test_a_batch_that_was_thrown_away_may_be_trained_on_again() -> None:
    private = counted()
    for x, y in private.loader:
        private.optimizer.zero_grad()
        F.cross_entropy(private.model(x), y).backward()
        train(private, x, y)
    assert private.steps == len(private.loader)


@pytest.mark.parametrize("wrap_model", [True, False])
def test_a_batch_of_another_loader_is_refused(wrap_model: bool) -> None:
    private = counted(wrap_model=wrap_model)
    x, y = next(iter(DataLoader(dataset(), batch_size=8, shuffle=True)))
    refused(private, x, y, NOTHING_DRAWN.format(rows=8))
    train(private, *first(private))


def test_a_batch_of_another_loader_is_refused_in_a_compiled_model() -> None:
    private = counted()
    batches = list(private.loader)
    train(private, *batches[0])  # in eager mode, which passes all checks
    compiled = private._replace(model=torch.compile(private.model, backend="eager"))
    for x, y in batches[1:]:
        train(compiled, x, y)
    refused(compiled, x, y, NOTHING_DRAWN.format(rows=len(x)))
    assert private.steps == len(batches)


def test_a_list_of_many_batches_trains() -> None:
    private = counted(data=dataset(1100), batch_size=1)
    batches = list(private.loader)
    for x, y in [*batches[:3], *batches[-3:]]:
        train(private, x, y)
    assert len(batches) == 1100
    assert private.steps == 6


class TwoParts(nn.Module):
    """Has a layer for each of two parts of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.other(z)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("longer", ["first", "second"])
def test_a_part_of_a_batch_with_more_rows_than_the_other_is_refused(
    compiled: bool, longer: str
) -> None:
    private = counted(TwoParts())
    model = torch.compile(private.model, backend="aot_eager") if compiled else private.model
    x, _ = next(iter(private.loader))
    parts = [torch.cat([x, x]), x] if longer == "first" else [x, torch.cat([x, x])]
    with pytest.raises(Exception, match=rf"in a batch of {len(parts[0])} examples: its first axis"):
        sum(out.sum() for out in model(*parts)).backward()
    with pytest.raises(PrivacyViolationError, match="not covered by the guarantee"):
        private.optimizer.step()
    private.optimizer.zero_grad()
    sum(out.sum() for out in model(x, x)).backward()
    private.optimizer.step()
    assert private.steps == 1


def test_a_batch_is_used_in_one_step_only() -> None:
    private = counted()
    x, y = next(iter(private.loader))
    train(private, x, y)
    refused(private, x, y, NOTHING_DRAWN.format(rows=len(x)))


@pytest.mark.parametrize("share", [3.0, 2.0, 1.2], ids=["crops", "generated", "augmented"])
def test_more_rows_than_items_are_refused(share: float) -> None:
    private = counted(batch_size=16)
    x, y = next(iter(private.loader))
    rows = torch.arange(round(len(x) * share)) % len(x)
    refused(private, x[rows], y[rows], TOO_MANY.format(rows=len(rows), items=len(x)))
    train(private, x, y)


def test_two_samples_in_one_step_are_refused() -> None:
    private = counted()
    batches = iter(private.loader)
    private.optimizer.signal_skip_step(True)
    train(private, *next(batches))
    x, y = next(batches)
    refused(private, x, y, TWO_SAMPLES)
    assert all(p.summed_grad is None for p in private.parameters)
    train(private, *next(batches))
    assert private.steps == 1


def test_a_logical_batch_that_was_left_in_the_middle_is_not_added_to_the_next() -> None:
    private = make_private(mlp(), counted=True, batch_size=16, noise_multiplier=1.0)

    def physical() -> BatchMemoryManager:
        return BatchMemoryManager(
            data_loader=private.loader, max_physical_batch_size=4, optimizer=private.optimizer
        )

    with physical() as loader:
        for x, y in loader:
            train(private, x, y)
            break
    with physical() as loader:
        batches = iter(loader)
        x, y = next(batches)
        refused(private, x, y, TWO_SAMPLES)
        for x, y in batches:
            train(private, x, y)
    assert private.steps == len(private.loader)


def test_one_step_for_each_part_of_a_batch_is_refused() -> None:
    private = counted()
    x, y = first(private)
    waiting = private.handle._guard.passes.samples._waiting
    del waiting[:-1]
    train(private, x[:1], y[:1])
    refused(private, x[1:], y[1:], NOTHING_DRAWN.format(rows=len(x) - 1))
