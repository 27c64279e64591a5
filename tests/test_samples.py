"""A step is of one batch that the private loader has drawn, each item one row, used once."""

from __future__ import annotations

import dataclasses
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
    Dataset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from opacus_bpclip import PrivacyEngine, PrivacyViolationError
from opacus_bpclip.samples import SampleLog
from tests.helpers import CLASSES, FEATURES, Private, dataset, make_private, mlp, values

NOTHING_DRAWN = (
    "The model trains on a batch of {rows} rows, but the data loader that make_private returned "
    "has drawn none that was not used yet: the batch came from elsewhere, or it is used a second "
    "time. The accountant takes each step for a Poisson sample of its own, drawn by that loader. "
    "Iterate over the loader that make_private returned for this model, and take one step for each "
    "of its batches. If two models train on the same batches, put both in one module whose forward "
    "runs them, with one optimizer over both."
)
TOO_MANY = (
    "The model trains on a batch of {rows} rows, but the data loader sampled {items} items: an "
    "item has several rows, or some rows are of no item (crops, augmented copies, generated "
    "examples). The bound holds for one row of each item; an item with several rows contributes "
    "several times as much. Make one row of each item in the dataset or collate_fn, and train on "
    "nothing but the loader's batch."
)
TWO_SAMPLES = (
    "One step would add up two sampled batches, which may share an example: it would contribute "
    "twice. A step is of one batch of the loader that make_private returned, or of all its parts. "
    "Do not signal_skip_step over several batches, and finish a logical batch before leaving "
    "BatchMemoryManager's loop (zero_grad() throws away what an unfinished one has collected, "
    "after this error). For larger batches, make the loader's batch_size larger."
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


def first(private: Private) -> tuple[Tensor, Tensor]:
    return next((x, y) for x, y in private.loader if len(x) > 2)


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
    loss = F.mse_loss(other.model(one.model(x)), x)
    with pytest.raises(PrivacyViolationError) as refusal:
        loss.backward()
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
    with pytest.raises(PrivacyViolationError, match="has drawn none"):
        F.cross_entropy(other(x), y).backward()
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(other(x), y).backward()
        optimizer.step()


# Items


def test_a_subset_is_what_is_sampled_from() -> None:
    data = TensorDataset(torch.arange(400.0)[:, None].expand(-1, FEATURES), torch.zeros(400).long())
    model = mlp()
    _, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=10, sampler=SubsetRandomSampler(range(100))),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
    )
    seen = torch.cat([x[:, 0] for _ in range(20) for x, _ in loader])
    assert set(seen.tolist()) == set(range(100))
    assert (optimizer.expected_batch_size, loader.sample_rate) == (10, 1 / 10)
    assert optimizer.step_hook.sample_rate == 1 / 10


class Backwards(torch.utils.data.Sampler):
    def __len__(self) -> int:
        return 32

    def __iter__(self) -> Iterator[int]:
        return iter(range(31, -1, -1))


def test_an_order_of_the_users_own_is_no_matter() -> None:
    model = mlp()
    _, _, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(dataset(), batch_size=8, sampler=Backwards()),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
    )
    assert loader.dataset.tensors[0].shape == (32, FEATURES)


# Forms of batches


@dataclasses.dataclass
class Pair:
    x: Tensor
    y: Tensor


class Items(Dataset[Any]):
    """Items of some form."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        self.form = form

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return self.form(*dataset()[index])


def _pairs(items: list[Pair]) -> Pair:
    return Pair(torch.stack([i.x for i in items]), torch.stack([i.y for i in items]))


def _named(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {**default_collate(items), "names": ["a"] * len(items)}


@pytest.mark.parametrize(
    ("form", "collate", "read"),
    [
        (lambda x, y: (x, y), None, lambda b: b),
        (lambda x, y: {"x": x, "y": y}, None, lambda b: (b["x"], b["y"])),
        (lambda x, y: {"x": x, "y": y}, _named, lambda b: (b["x"], b["y"])),
        (lambda x, y: {"in": {"x": x}, "out": [y]}, None, lambda b: (b["in"]["x"], b["out"][0])),
        (Pair, _pairs, lambda b: (b.x, b.y)),
    ],
    ids=["tuple", "dict", "dict with a list", "nested", "dataclass"],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_any_form_train_and_an_empty_first_one_has_that_form(
    form: Any, collate: Any, read: Any, workers: int
) -> None:
    torch.manual_seed(0)
    model, engine = mlp(), PrivacyEngine()
    options = {"num_workers": workers} if workers else {}
    handle, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(Items(form), batch_size=1, collate_fn=collate, **options),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
    )
    x, y = read(loader.collate_fn([]))
    assert (x.shape, x.dtype) == ((0, FEATURES), torch.float32)
    assert (y.shape, y.dtype) == ((0,), torch.int64)
    sizes = []
    for batch in loader:
        x, y = read(batch)
        sizes.append(len(x))
        optimizer.zero_grad()
        F.cross_entropy(handle(x), y, reduction="sum").backward()
        optimizer.step()
    assert 0 in sizes
    assert engine.accountant.history == [(1.0, 1 / 12, 12)]


def test_sequence_first_batches_are_emptied_on_their_own_axis() -> None:
    def second(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        x, y = default_collate(items)
        return x.T[..., None], y

    model = nn.Sequential(nn.Linear(1, CLASSES))
    _, _, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(dataset(), batch_size=4, collate_fn=second),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        batch_first=False,
        clipping="backprop",
    )
    x, y = loader.collate_fn([])
    assert (x.shape, y.shape) == ((FEATURES, 0, 1), (0,))


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
            assert log.spend(count) is None
            log.collect()
            assert log.skips(pop=True) is (skip and announced)
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
            log.collect()
            log.close()
    assert accepted <= sum(items)
