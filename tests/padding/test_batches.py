"""The loader's physical batches: their shape, their number, what they announce."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from typing import Any

import opacus
import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_bpclip import PrivacyEngine, PrivacyViolationError, register, unregister
from opacus_bpclip.sampling.problems import LEFT_OUT
from tests.helpers import (
    SEARCHES_FOR_NOISE,
    Private,
    backward,
    dataset,
    make_private,
    mlp,
    snapshot,
)
from tests.padding.models import items_of
from tests.padding.training import check_alike, private_of, train


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def sizes_of(private: Private, passes: int = 4) -> list[int]:
    """Return how many items each sample of some passes has."""
    return [len(x) for _ in range(passes) for x, _ in private.loader]


def sums_of(rows: int | None = None, passes: int = 1, **options: Any) -> list[Tensor]:
    """Return the sums of the samples that all these tests draw."""
    private = private_of(rows=rows, **options)
    return [total for _ in range(passes) for total in train(private)]


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
def test_every_sample_makes_whole_batches_of_one_size(rows: int) -> None:
    expected = sizes_of(private_of(rows=None))
    private = private_of(rows=rows)
    parts: list[int] = []
    for x, y in (batch for _ in range(4) for batch in private.loader):
        assert x.shape == (rows, 4)
        assert y.shape == (rows,)
        signal = private.handle._guard.passes.samples._signals[-1]
        parts.append(signal.skip)
    assert len(parts) - sum(parts) == len(expected)
    assert len(parts) == sum(max(1, -(-n // rows)) for n in expected)
    assert not parts[-1]


def test_empty_samples_and_full_ones_are_steps_like_any_other() -> None:
    data = items_of("perceptron", 6)
    found = {}
    noise = {"noise_multiplier": 1.0, "noise_generator": torch.Generator()}
    for rows in (2, None):
        private = private_of(rows=rows, data=data, batch_size=2, **noise)
        found[rows] = [total for _ in range(12) for total in train(private)]
        drawn = sizes_of(private_of(rows=None, data=data, batch_size=2), passes=12)
        assert {0, 1, 2, 4} <= set(drawn)
        assert private.engine.accountant.history == [(1.0, 1 / 3, 36)]
        assert [not total.any() for total in found[rows]] == [n == 0 for n in drawn]
    check_alike(found[2], found[None])


@pytest.mark.parametrize("largest", [3, 8, 11])
def test_batch_memory_manager_splits_such_a_loader(largest: int) -> None:
    expected = sums_of()
    private = private_of(rows=8)
    with BatchMemoryManager(
        data_loader=private.loader, max_physical_batch_size=largest, optimizer=private.optimizer
    ) as loader:
        batches = []
        for batch in loader:
            assert len(batch[0]) in (8, 16)[: 1 + (largest > 8)]
            batches.append(train(private, [batch]))
    check_alike([total for one in batches for total in one], expected)
    assert private.steps == 3


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_fill_up_too(persistent: bool) -> None:
    found = []
    for rows in (5, None):
        private = private_of(kind="attention", rows=rows)
        private.loader.num_workers, private.loader.prefetch_factor = 1, 2
        object.__setattr__(private.loader, "persistent_workers", persistent)
        found.append([total for _ in range(2) for total in train(private)])
        assert private.steps == 6
    check_alike(*found)


def test_batches_that_are_read_ahead_belong_to_their_samples() -> None:
    expected = sums_of()
    private = private_of(rows=5)

    def ahead() -> Iterator[Any]:
        held: list[Any] = []
        for batch in private.loader:
            held.append(batch)
            if len(held) > 2:
                yield held.pop(0)
        yield from held

    check_alike(train(private, ahead()), expected)


def test_a_loader_that_is_made_of_its_parts_yields_whole_samples() -> None:
    # As accelerate makes one: filled up, and not cut.
    expected = sums_of()
    private = private_of(rows=4)
    loader = private.loader
    anew = DataLoader(
        loader.dataset,
        batch_sampler=loader.batch_sampler,
        collate_fn=loader.collate_fn,
        generator=loader.generator,  # of which a loader, too, takes a number for each pass
    )
    batches = list(anew)
    assert all(len(x) % 4 == 0 for x, _ in batches)
    check_alike(train(private, batches), expected)


def test_a_part_that_is_left_out_is_found() -> None:
    private = private_of(rows=2)
    with pytest.raises(PrivacyViolationError, match=exactly(LEFT_OUT)):
        train(private, (batch for index, batch in enumerate(private.loader) if index != 1))


def test_copies_and_pickles_keep_the_shape() -> None:
    private = private_of(rows=8)
    collate = pickle.loads(pickle.dumps(private.loader.collate_fn))
    assert len(collate(items_of("perceptron")[:3])[0]) == 8
    twin = copy.deepcopy(private.handle)
    assert twin._guard.passes.samples.is_padded
    assert twin._budget.present is None


@pytest.mark.parametrize("stock", [True, False])
@SEARCHES_FOR_NOISE
def test_each_way_to_make_private_takes_the_size(stock: bool) -> None:
    if stock:
        register()
    try:
        engine = (opacus.PrivacyEngine if stock else PrivacyEngine)(accountant="gdp")
        model = mlp()
        made = engine.make_private_with_epsilon(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(dataset(), batch_size=8),
            target_epsilon=2.0,
            target_delta=1e-3,
            epochs=1,
            max_grad_norm=1.0,
            clipping="backprop",
            physical_batch_size=5,
        )
        assert {len(x) for x, _ in made[2]} == {5}
    finally:
        unregister()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"physical_batch_size": value},
            f"Expected physical_batch_size={value!r} to be an integer >= 1, the number of rows of "
            "each batch that the loader yields, or None.",
        )
        for value in (0, -1, 2.0, True, "8")
    ]
    + [
        (
            {"physical_batch_size": 8, "poisson_sampling": False},
            "physical_batch_size=8 pads the batches of the private loader, but "
            "poisson_sampling=False keeps your own loader. Leave one of them out.",
        ),
        (
            {"physical_batch_size": 8, "clipping": "flat", "backprop": None},
            "physical_batch_size=8 was given with clipping='flat', but needs "
            'clipping="backprop".',
        ),
    ],
)
def test_what_cannot_be_a_size_is_refused_and_nothing_is_touched(
    options: dict[str, Any], message: str
) -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match=exactly(message)):
        PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(dataset(), batch_size=8),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            **{"clipping": "backprop"} | options,
        )
    assert snapshot(model) == before


def test_nothing_is_masked_without_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    private = make_private(nn.Sequential(nn.Linear(4, 3)))
    monkeypatch.setattr(torch.Tensor, "any", None)
    backward(private)
    assert private.handle._budget.present is None


@pytest.mark.parametrize(("before", "rows"), [(8, None), (8, 6), (6, 8), (None, 8)])
def test_a_loader_that_is_made_private_again_has_its_own_padding(
    before: int | None, rows: int | None
) -> None:
    first = make_private(mlp(), counted=True, physical_batch_size=before)
    first.handle.cleanup()
    engine = first.engine
    model = first.handle._module
    _, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=first.loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
        physical_batch_size=rows,
    )
    for x, y in loader:
        assert rows is None or len(x) == rows
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
        optimizer.step()
    assert first.steps == 4
