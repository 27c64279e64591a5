"""What the private loader samples from, and the form of what it yields."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from opacus_bpclip import PrivacyEngine
from opacus_bpclip.sampling.items import sampled_items
from tests.helpers import CLASSES, FEATURES, dataset, mlp

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


class Backwards(Sampler):
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


# Samplers inside batch samplers


@pytest.mark.parametrize("order", [torch.randperm(32).tolist(), range(32), Backwards()])
def test_any_order_of_all_items_is_kept(order: Any) -> None:
    for options in (
        {"sampler": order, "batch_size": 8},
        {"batch_sampler": BatchSampler(order, 8, False)},
    ):
        assert sampled_items(DataLoader(dataset(), **options)).dataset.tensors[0].shape[0] == 32


@pytest.mark.parametrize("inside", [True, False])
def test_a_subset_inside_a_batch_sampler_is_kept(inside: bool) -> None:
    subset = SubsetRandomSampler(range(10))
    options = (
        {"batch_sampler": BatchSampler(subset, 5, True)}
        if inside
        else {"sampler": subset, "batch_size": 5, "drop_last": True}
    )
    loader = sampled_items(DataLoader(dataset(), **options))
    assert (len(loader.dataset), loader.batch_size, loader.drop_last) == (10, 5, True)


def test_what_a_batch_sampler_hides_is_refused() -> None:
    samplers = [
        BatchSampler(WeightedRandomSampler([1.0] * 32, 60), 8, False),
        BatchSampler(range(10), 8, False),
        UniformWithReplacementSampler(num_samples=10, sample_rate=0.1),
    ]
    for sampler in samplers:
        with pytest.raises(ValueError, match="Poisson sampling would replace"):
            sampled_items(DataLoader(dataset(), batch_sampler=sampler))
