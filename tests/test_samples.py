"""A step is of one batch that the private loader has drawn, each item one row, used once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
)

from opacus_bpclip import PrivacyEngine, PrivacyViolationError
from opacus_bpclip.sample_problems import TWO_SAMPLES
from opacus_bpclip.samples import SampleLog
from tests.helpers import FEATURES, dataset, make_private, mlp, values
from tests.sampling import NOTHING_DRAWN, TOO_MANY, counted, first, refused, train

# Ways to read the loader that train on each batch once


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


# What is refused


@pytest.mark.parametrize("wrap_model", [True, False])
def test_a_batch_of_another_loader_is_refused(wrap_model: bool) -> None:
    private = counted(wrap_model=wrap_model)
    x, y = next(iter(DataLoader(dataset(), batch_size=8, shuffle=True)))
    refused(private, x, y, NOTHING_DRAWN.format(rows=8))
    train(private, *first(private))


def test_a_batch_of_another_loader_is_refused_in_a_compiled_model() -> None:
    private = counted()
    batches = list(private.loader)
    train(private, *batches[0])  # vouches for the model
    compiled = private._replace(model=torch.compile(private.model, backend="eager"))
    for x, y in batches[1:]:
        train(compiled, x, y)
    compiled.optimizer.zero_grad()
    F.cross_entropy(compiled.model(x), y).backward()
    with pytest.raises(PrivacyViolationError, match=r"^The model trains on a batch, but the data"):
        compiled.optimizer.step()
    assert private.steps == len(batches)


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


# Two models


class Coder(nn.Module):
    """An autoencoder in two parts."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList([encoder, decoder])

    def forward(self, x: Tensor) -> Tensor:
        encoder, decoder = self.parts
        return decoder(encoder(x))


def test_two_models_may_each_train_on_samples_of_their_own() -> None:
    engine = PrivacyEngine()
    data = dataset()
    both = [counted(engine=engine, data=data) for _ in range(2)]
    for private in both:
        for x, y in private.loader:
            train(private, x, y)
    assert engine.accountant.history == [(1.0, 1 / 4, 8)]


def test_two_models_on_one_sample_are_refused_and_one_module_for_both_is_accounted_right() -> None:
    engine = PrivacyEngine()
    encoder, decoder = nn.Linear(FEATURES, 2), nn.Linear(2, FEATURES)
    data = dataset()
    one = counted(encoder, engine=engine, data=data)
    other = counted(decoder, engine=engine, data=data)
    x, _ = first(other)
    F.mse_loss(other.model(one.model(x)), x).backward()
    other.optimizer.step()
    with pytest.raises(PrivacyViolationError) as refusal:
        one.optimizer.step()
    assert str(refusal.value) == NOTHING_DRAWN.format(rows=len(x))
    for private in (one, other):
        private.handle.cleanup()

    engine = PrivacyEngine()
    model = Coder(encoder, decoder)
    groups = [
        {"params": part.parameters(), "lr": lr}
        for part, lr in zip(model.parts, (0.1, 0.2), strict=True)
    ]
    handle, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(groups),
        data_loader=DataLoader(dataset(), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
    )
    for x, _ in loader:
        optimizer.zero_grad()
        F.mse_loss(handle(x), x).backward()
        optimizer.step()
    assert engine.accountant.history == [(1.0, 1 / 4, 4)]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_a_private_loader_that_is_passed_again_gives_samples_of_their_own() -> None:
    one = counted()
    other, optimizer, loader = one.engine.make_private(
        module=(model := mlp()),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=one.loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
    )
    assert loader is not one.loader
    assert len(loader) == len(one.loader)
    x, y = first(one)
    F.cross_entropy(other(x), y).backward()
    with pytest.raises(PrivacyViolationError, match="has drawn none"):
        optimizer.step()
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(other(x), y).backward()
        optimizer.step()


# Backward passes that train nothing


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, FEATURES)

    def forward(self, z: Tensor) -> Tensor:
        return self.layer(z)


@pytest.mark.parametrize("how", ["as it is", "frozen meanwhile", "by a gradient of its input"])
def test_a_generator_trains_through_a_private_discriminator(how: str) -> None:
    private, generator = counted(), Generator()
    other = torch.optim.SGD(generator.parameters(), lr=0.1)
    parameters = list(private.handle._module.parameters())
    for x, y in private.loader:
        train(private, x, y)
        private.optimizer.zero_grad()
        before = values(private)
        other.zero_grad()
        fake = generator(torch.randn(9, 2))
        if how == "by a gradient of its input":
            (slope,) = torch.autograd.grad(private.model(fake).sum(), fake)
            fake.backward(slope)
        else:
            for p in parameters:
                p.requires_grad_(how == "as it is")
            private.model(fake).sum().backward()
            for p in parameters:
                p.requires_grad_(True)
        other.step()
        assert generator.layer.weight.grad is not None
        assert torch.equal(values(private), before)
        private.optimizer.zero_grad()
    assert private.steps == len(private.loader)


def test_what_a_generator_left_in_the_discriminator_is_not_released() -> None:
    private = counted()
    private.model(torch.randn(9, FEATURES)).sum().backward()
    with pytest.raises(PrivacyViolationError) as refusal:
        private.optimizer.step()
    assert str(refusal.value) == NOTHING_DRAWN.format(rows=9)


def test_a_copy_does_not_inherit_the_batches_that_wait() -> None:
    private = counted()
    x, y = first(private)
    model, optimizer = copy.deepcopy((private.model, private.optimizer))
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(PrivacyViolationError, match="has drawn none"):
        optimizer.step()
    train(private, x, y)


# The log itself


@st.composite
def honest_uses(draw: st.DrawFn) -> list[tuple[int, list[int], bool]]:
    """Sampled batches, each with the parts that it is trained in and whether it is left out."""
    uses = []
    for _ in range(draw(st.integers(1, 12))):
        parts = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
        uses.append((sum(parts), parts, draw(st.booleans()) and draw(st.booleans())))
    return uses


@given(honest_uses(), st.integers(0, 3), st.booleans())
def test_honest_use_is_never_refused(
    uses: list[tuple[int, list[int], bool]], ahead: int, announced: bool
) -> None:
    log = SampleLog()
    log.attached = True
    iteration = log.begin()
    drawn = 0
    for index, (_, parts, left_out) in enumerate(uses):
        while drawn < min(len(uses), index + 1 + (0 if announced else ahead)):
            log.draw(uses[drawn][0], iteration)
            drawn += 1
        if left_out and not announced:
            continue
        # Without announcements, a plain loop: whole batches.
        rows = parts if announced else [sum(parts)]
        for part, count in enumerate(rows):
            skip = part < len(rows) - 1
            if announced:
                log.signal(skip)
            assert log.skips(pop=True, rows=count) is (skip and announced)
            assert log.spend(count) is None
            if not skip:
                log.close()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 9), st.data())
def test_no_sample_is_used_by_more_rows_or_steps_than_it_has(
    items: list[int], extra: int, data: st.DataObject
) -> None:
    log = SampleLog()
    log.attached = True
    iteration = log.begin()
    for count in items:
        log.draw(count, iteration)
    assert log.spend(max(items) + extra) is not None
    accepted = 0
    for _ in range(len(items) + 3):
        rows = data.draw(st.integers(1, 12))
        if log.spend(rows) is None:
            accepted += rows
            log.close()
    assert accepted <= sum(items)
