"""Items that a data set has once, and collate functions that make each row of one item alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.data_loader import DPDataLoader
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torch.utils.data import default_collate as stacked

from opacus_bpclip import AugmentedViews, CrossEntropy, PrivacyEngine
from opacus_bpclip.sampling.collating import problem_of_collating
from opacus_bpclip.sampling.items import sampled_items
from tests.helpers import CLASSES, mlp
from tests.helpers import dataset as examples

Items = list[tuple[Tensor, Tensor]]


def private(data: Dataset[Any], collate: Callable[[Items], Any] | None = None) -> Any:
    model = mlp()
    return PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=8, collate_fn=collate),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
    )


def standardised(items: Items) -> Any:
    x, y = stacked(items)
    return (x - x.mean(0)) / x.std(0).clamp(min=1e-5), y


def divided_by_the_largest(items: Items) -> Any:
    x, y = stacked(items)
    return x / x.abs().max(), y


def mixed(items: Items) -> Any:
    x, y = stacked(items)
    return x.lerp(x.roll(1, 0), 0.5), y


def with_negatives(items: Items) -> Any:
    x, y = stacked(items)
    return {"x": x, "other": x.flip(0), "y": y}


def of_labels(items: Items) -> Any:
    x, y = stacked(items)
    return x, F.one_hot(y, CLASSES) - F.one_hot(y, CLASSES).float().mean(0)


def beside_a_large_number(items: Items) -> Any:
    x, y = standardised(items)
    return torch.cat([x, 1.6e9 + stacked(items)[0][:, :1]], dim=1), y


@pytest.mark.parametrize(
    "collate",
    [
        *(standardised, divided_by_the_largest, mixed, with_negatives, of_labels),
        beside_a_large_number,
    ],
)
def test_rows_that_depend_on_other_items_are_refused(collate: Callable[[Items], Any]) -> None:
    with pytest.raises(ValueError, match=r"another row of an item beside other items"):
        private(examples(), collate)


def normalised_by_constants(items: Items) -> Any:
    x, y = stacked(items)
    return (x - 0.1) / 0.3, y


def normalised_each_by_itself(items: Items) -> Any:
    x, y = stacked(items)
    return F.normalize(x - x.mean(1, keepdim=True)), y


def numbered(items: Items) -> Any:
    return torch.arange(len(items)), *stacked(items)


def in_order(items: Items) -> Any:
    return stacked(sorted(items, key=lambda item: float(item[0].sum())))


def flipped_together(items: Items) -> Any:
    x, y = stacked(items)
    return x.flip(1) if torch.rand(()) < 0.3 else x, y


def noisy(items: Items) -> Any:
    x, y = stacked(items)
    return x + torch.randn_like(x), y


def with_a_count(items: Items) -> Any:
    return {"x": stacked(items)[0], "count": torch.tensor(len(items)), "names": ["a"] * len(items)}


def failing(items: Items) -> Any:
    raise RuntimeError("one's own")


def padded(items: Items) -> Any:
    return pad_sequence([x[: 1 + i % 2] for i, (x, _) in enumerate(items)]), torch.ones(len(items))


@pytest.mark.parametrize(
    "collate",
    [
        *(normalised_by_constants, normalised_each_by_itself, numbered, in_order, noisy),
        *(with_a_count, failing, padded, flipped_together),
    ],
)
def test_what_depends_on_no_other_item_or_cannot_be_told_is_accepted(
    collate: Callable[[Items], Any],
) -> None:
    loader = DataLoader(examples(), batch_size=8, collate_fn=collate)
    before = torch.random.get_rng_state()
    assert problem_of_collating(loader, axis=0) is None
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_data_set_of_few_items_and_numbers_that_are_none_are_accepted() -> None:
    x = torch.full((3, 4), float("nan"))
    few = TensorDataset(x, torch.zeros(3).long())
    assert problem_of_collating(DataLoader(few, collate_fn=normalised_by_constants), axis=0) is None
    many = TensorDataset(x.repeat(3, 1), torch.zeros(9).long())
    assert (
        problem_of_collating(DataLoader(many, collate_fn=normalised_by_constants), axis=0) is None
    )


class Keyed(dict[str, Any]):
    """Items by names."""


class Unsized(Dataset):
    def __getitem__(self, index: int) -> Any:
        return examples()[index]


class Endless(Unsized):
    """Has items beyond its length."""

    def __len__(self) -> int:
        return 10


class Zipped(ConcatDataset):
    """Has one item for each of two data sets' items."""

    def __len__(self) -> int:
        return len(self.datasets[0])

    def __getitem__(self, index: int) -> Any:
        return self.datasets[0][index]


def rare(data: Dataset[Any]) -> Dataset[Any]:
    return Subset(data, [*range(8), *[3] * 4])


@pytest.mark.parametrize(
    ("make", "repeats"),
    [
        (rare, 4),
        (lambda data: ConcatDataset([data] * 3), 64),
        (lambda data: Subset(ConcatDataset([data, Subset(data, [5, 6])]), range(33)), 1),
        (lambda data: ConcatDataset([Subset(data, [0, 1]), Subset(Subset(data, [1, 2]), [0])]), 1),
        (lambda data: Subset(data, [*range(8), -len(data)]), 1),
        (lambda data: Subset(Unsized(), [*range(8), 3, 3]), 2),
        (lambda data: ConcatDataset([TensorDataset(*data.tensors) for _ in range(2)]), 32),
        (lambda data: Subset(ConcatDataset([data, examples()]), [40, 3, 40]), 1),
        (lambda data: Subset(Keyed(zip("abcd", data, strict=False)), list("abca")), 1),
    ],
    ids=[
        "rare class",
        "repeated",
        "overlap",
        "nested",
        "from the end",
        "unsized",
        "shared",
        "of parts",
        "keys",
    ],
)
def test_items_that_are_there_several_times_are_refused(
    make: Callable[[Dataset[Any]], Dataset[Any]], repeats: int
) -> None:
    with pytest.raises(ValueError, match=f"^The data set has {repeats} items more than once"):
        private(make(examples()))


@pytest.mark.parametrize(
    "make",
    [
        lambda data: Subset(data, range(8, 24)),
        lambda data: Subset(Subset(data, torch.arange(16)), [-1, 0, 3]),
        lambda data: ConcatDataset([data, examples()]),
        lambda data: ConcatDataset([Subset(data, [0, 1]), Subset(data, [2, 3])]),
        lambda data: Subset(Keyed(zip("abcd", data, strict=False)), list("abc")),
        lambda data: Subset(Unsized(), [5, 2, 9]),
        lambda data: Subset(Endless(), range(40)),
        lambda data: Zipped([data, data]),
        lambda data: Subset(ConcatDataset([data, examples()]), [40, 8, -1]),
    ],
    ids=[
        *("subset", "tensor", "equal values", "parts", "keys", "unsized", "endless", "zipped"),
        "of parts",
    ],
)
def test_items_that_are_there_once_are_accepted(
    make: Callable[[Dataset[Any]], Dataset[Any]],
) -> None:
    loader = DataLoader(make(examples()), batch_size=2)
    assert sampled_items(loader) is loader


def test_the_remedies_for_repeated_items() -> None:
    views = AugmentedViews(examples(), lambda x: x + torch.randn_like(x), views=2)
    assert sampled_items(DataLoader(views, batch_size=4)).dataset is views
    weights = CrossEntropy(weight=torch.tensor([1.0, 4.0, 1.0][:CLASSES]))
    model, *_ = private(examples())
    x, y = examples().tensors
    assert weights(model(x), y).isfinite()


class AtOnce(TensorDataset):
    """Makes all items of a batch together."""

    def __init__(self, standardise: bool) -> None:
        super().__init__(*examples().tensors)
        self.standardise = standardise

    def __getitems__(self, indices: list[int]) -> Items:
        x, y = (own[indices] for own in self.tensors)
        return list(zip((x - x.mean(0)) if self.standardise else x, y, strict=True))


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: Subset(data, range(20))])
def test_items_that_are_made_of_others_are_refused(
    wrap: Callable[[Dataset[Any]], Dataset[Any]],
) -> None:
    with pytest.raises(ValueError, match=r"another row of an item beside other items"):
        private(wrap(AtOnce(standardise=True)))
    private(wrap(AtOnce(standardise=False)))


def test_items_of_a_loader_that_is_private_already_are_looked_at() -> None:
    data = Subset(examples(), [*range(8), 3])
    with pytest.raises(ValueError, match="has 1 items more than once"):
        sampled_items(DPDataLoader.from_data_loader(DataLoader(data, batch_size=3)))
