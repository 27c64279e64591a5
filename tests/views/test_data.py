"""`AugmentedViews`: items, random numbers of their own, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from opacus_bpclip import AugmentedViews


def numbered(size: int = 6) -> TensorDataset:
    return TensorDataset(torch.arange(size).float()[:, None].expand(size, 3), torch.arange(size))


def drawing(x: Tensor) -> Tensor:
    """Draw from every global generator, a number of times that depends on the item."""
    for _ in range(int(x[0])):
        random.random()
        np.random.rand()
        torch.rand(())
    return x + torch.tensor([random.random(), np.random.rand(), float(torch.rand(()))])


def test_an_item_is_views_and_repeated_targets() -> None:
    data = AugmentedViews(numbered(), drawing, 4, seed=0)
    x, y = data[5]
    assert len(data) == 6
    assert x.shape == (4, 3)
    assert x.dtype == torch.float32
    assert y.tolist() == [5] * 4
    assert ((x - 5 >= 0) & (x - 5 < 1)).all()
    assert len({tuple(view.tolist()) for view in x}) == 4
    soft = AugmentedViews([(torch.zeros(2), torch.tensor([0.2, 0.8]), 1.5)], torch.exp, 2)
    _, target, weight = soft[0]
    assert torch.equal(target, torch.tensor([[0.2, 0.2], [0.8, 0.8]]))
    assert torch.equal(weight, torch.tensor([1.5, 1.5]))


def test_an_items_views_do_not_depend_on_what_else_is_read() -> None:
    def views(*indices: int) -> Tensor:
        data = AugmentedViews(numbered(), drawing, 3, seed=1)
        return [data[index][0] for index in indices][-1]

    assert torch.equal(views(3), views(5, 1, 3))
    assert not torch.equal(views(3), views(3, 3))
    assert not torch.equal(views(3) - 3, views(4) - 4)


def test_global_generators_are_left_as_they_are() -> None:
    data = AugmentedViews(numbered(), drawing, 3, seed=1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    data[2]
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_the_seed_comes_from_torch_unless_it_is_given() -> None:
    torch.manual_seed(0)
    first, second = (AugmentedViews(numbered(), drawing, 2) for _ in range(2))
    assert first.seed != second.seed
    torch.manual_seed(0)
    again = AugmentedViews(numbered(), drawing, 2)
    assert torch.equal(first[3][0], again[3][0])


class ManyAtOnce(Dataset[Any]):
    """Reads items together, each with something of the others."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([float(index)]), index

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        return [(torch.tensor([float(sum(indices))]), index) for index in indices]


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: Subset(data, range(6))])
def test_items_are_read_one_by_one(wrap: Callable[[Any], Any]) -> None:
    data = wrap(AugmentedViews(ManyAtOnce(), lambda x: x, 2))
    for x, y in DataLoader(data, batch_size=4):
        assert torch.equal(x[:, :, 0], y.float())


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_make_other_views_in_each_epoch(persistent: bool) -> None:
    data = AugmentedViews(numbered(), drawing, 2, seed=3)
    loader = DataLoader(
        data,
        batch_size=2,
        num_workers=2,
        persistent_workers=persistent,
        generator=torch.Generator().manual_seed(0),
    )
    first, second = (torch.cat([x for x, _ in loader]) for _ in range(2))
    shifts = torch.cat([first, second]) - torch.arange(6).repeat(2).view(-1, 1, 1)
    assert len({tuple(view.tolist()) for view in shifts.flatten(0, 1)}) == 24


@pytest.mark.parametrize(
    ("item", "transform", "error", "message"),
    [
        (torch.zeros(3), torch.exp, TypeError, "needs items (input, target), and got a Tensor"),
        ((torch.zeros(3), "cat"), torch.exp, TypeError, "and got a str. Make such targets in"),
        ((torch.zeros(3), 1), Tensor.tolist, TypeError, "returns a list, and not a tensor"),
        (
            (torch.zeros(3), 1),
            lambda x: x[: torch.randint(2, (), dtype=torch.int64)],
            ValueError,
            "makes views of the shapes (",
        ),
    ],
)
def test_items_that_have_no_views_are_refused(
    item: Any, transform: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as refusal:
        AugmentedViews([item], transform, 16, seed=0)[0]
    assert message in str(refusal.value)


def test_a_number_of_views_is_an_integer_above_zero() -> None:
    with pytest.raises(ValueError, match="Expected views=0 to be an integer >= 1, the number of"):
        AugmentedViews(numbered(), drawing, 0)
