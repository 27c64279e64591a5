"""Ranks whose items are not the same, or not dealt out, are refused before training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    random_split,
)
from torch.utils.data.distributed import DistributedSampler

from opacus_bpclip import PrivacyEngine
from opacus_bpclip.sampling.identity import ONE_DATA_SET
from tests.ranks.models import Net, Private, examples, make_private, wrapped
from tests.ranks.pair import pair
from tests.ranks.test_refusals import told


def split(seed: int, size: int = 38) -> Dataset[Any]:
    whole = TensorDataset(*examples(40))
    return random_split(whole, [size, 40 - size], torch.Generator().manual_seed(seed))[0]


class Noisy(Dataset[Any]):
    """Items that are augmented anew at each reading, otherwise on each rank."""

    def __init__(self, rank: int, own: bool) -> None:
        self.x, self.y = examples(40)
        self.generator = torch.Generator().manual_seed(rank) if own else None

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        flips = torch.rand(self.x.shape[1], generator=self.generator)
        return torch.where(flips < 0.5, self.x[index], 0), self.y[index]


class Unreadable(TensorDataset):
    """The last items are missing on rank 1."""

    rank = 0

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if self.rank == 1 and index > 30:
            raise OSError("no such file")
        return super().__getitem__(index)


def unreadable(rank: int) -> Dataset[Any]:
    data = Unreadable(*examples(40))
    data.rank = rank
    return data


DATA: dict[str, tuple[Callable[[int], Dataset[Any]], str]] = {
    "splits": (split, "the items that a Subset or SubsetRandomSampler chooses (their hashes): ("),
    "a split inside": (
        lambda rank: ConcatDataset([split(rank), split(0)]),
        "the items that a Subset or SubsetRandomSampler chooses (their hashes): (",
    ),
    "kinds": (
        lambda rank: split(0) if rank else TensorDataset(*examples(38)),
        "the data set's kind: ('TensorDataset', 38), ('Subset', 38), ('TensorDataset', 40). ",
    ),
    "values": (
        lambda rank: TensorDataset(*examples(40, seed=rank)),
        "the data set's item 0 (its hash): ",
    ),
    "order": (
        lambda rank: TensorDataset(*(x.flip(0) if rank else x for x in examples(40))),
        "the data set's item 0 (its hash): ",
    ),
    "the same split": (lambda rank: split(0), ""),
    "augmentation": (lambda rank: Noisy(rank, own=False), ""),
    "augmentation by an own generator": (lambda rank: Noisy(rank, own=True), ""),
    "items that cannot be read": (unreadable, ""),
}


def with_data(rank: int, name: str) -> str:
    return told(lambda: make_private("DPDDP", data=DATA[name][0](rank)))


@pytest.mark.parametrize("name", DATA)
def test_ranks_with_other_items_of_the_same_number_are_refused(name: str) -> None:
    text = DATA[name][1]
    one, other = pair().run(with_data, name)
    assert one == other
    if not text:
        assert one == ""
        return
    assert one.startswith(f"ValueError: The ranks differ in {text}")
    assert one.endswith(f". {ONE_DATA_SET}")


def made(data: Dataset[Any], *, poisson_sampling: bool = True, **options: Any) -> Private:
    model = wrapped(Net(), "DPDDP")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        data_loader=DataLoader(data, batch_size=5, **options),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
        poisson_sampling=poisson_sampling,
    )
    return Private(engine, private, optimizer, loader)


def with_own_sampler(rank: int) -> str:
    indices = range(20 * rank, 20 * rank + 20)
    return told(lambda: made(TensorDataset(*examples(40)), sampler=SubsetRandomSampler(indices)))


def test_ranks_whose_samplers_choose_other_items_are_refused() -> None:
    one, other = pair().run(with_own_sampler)
    assert one == other
    text = "The ranks differ in the items that a Subset or SubsetRandomSampler chooses"
    assert one.startswith(f"ValueError: {text}")


SAMPLERS: dict[str, Callable[[Dataset[Any], int], dict[str, Any]]] = {
    "shuffled": lambda data, rank: {"shuffle": True},
    "as if of one rank": lambda data, rank: {
        "sampler": DistributedSampler(data, num_replicas=1, rank=0)
    },
    "of rank 0": lambda data, rank: {
        "sampler": DistributedSampler(data, num_replicas=2, rank=0, drop_last=True)
    },
    "filled up": lambda data, rank: {"sampler": DistributedSampler(data)},
    "of other data": lambda data, rank: {
        "sampler": DistributedSampler(TensorDataset(torch.ones(8)), drop_last=True)
    },
}


def without_poisson(rank: int, name: str) -> str:
    data = TensorDataset(*examples(41))
    return told(lambda: made(data, poisson_sampling=False, **SAMPLERS[name](data, rank)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_loader_of_ones_own_that_does_not_deal_items_out_is_refused(name: str) -> None:
    answers = pair().run(without_poisson, name)
    rank = 1 if name == "of rank 0" else 0
    text = (
        f"ValueError: With poisson_sampling=False, the data loader of rank {rank} of 2 does not "
        "give each item to exactly one rank: an example that several ranks have in one step "
        "contributes several times what the noise is made for, and the sampling rate is not the "
        "one that is accounted for. Pass DataLoader(dataset, batch_size=..., "
        "sampler=DistributedSampler(dataset, drop_last=True)) of torch.utils.data, with the "
        "batch_size of each rank, or leave poisson_sampling=False out."
    )
    assert answers[rank] == text
    assert "so no rank trains: ValueError: " in answers[0] or rank == 0
    assert "does not give each item to exactly one rank" in answers[1 - rank]


def divided(rank: int) -> str:
    data = TensorDataset(*examples(40))
    return told(lambda: made(data, poisson_sampling=False, sampler=DistributedSampler(data)))


def test_a_data_set_that_the_ranks_divide_needs_no_drop_last() -> None:
    assert pair().run(divided) == ["", ""]


class Keyed(TensorDataset):
    """Items by names."""

    def __getitem__(self, name: str) -> tuple[Tensor, ...]:
        return super().__getitem__(int(name[1:]))


def keyed(rank: int, same: bool) -> str:
    names = [f"n{index}" for index in range(40)]
    shift = 0 if same else rank
    return told(
        lambda: make_private("DPDDP", data=Subset(Keyed(*examples(44)), names[shift : shift + 38]))
    )


@pytest.mark.parametrize("same", [True, False])
def test_keys_that_are_no_numbers_are_compared(same: bool) -> None:
    one, other = pair().run(keyed, same)
    assert one == other
    assert ("that a Subset or SubsetRandomSampler chooses" in one) is not same


def dealt(rank: int, seeds: tuple[int, int]) -> Any:
    """Train an epoch with the remedy; return the items seen, the divisor, and what was spent."""
    data = TensorDataset(*examples(41), torch.arange(41))
    sampler = DistributedSampler(data, drop_last=True, seed=seeds[rank])
    data.tensors = data.tensors[:2]
    answers: list[Any] = []

    def train() -> None:
        private = made(data, poisson_sampling=False, sampler=sampler)
        for x, y in private.loader:
            private.optimizer.zero_grad()
            private.backward(x, y)
            private.optimizer.step()
        divisor = private.optimizer.expected_batch_size * 2
        answers.extend((sorted(sampler), divisor, private.engine.accountant.history))

    return told(train) or answers


def test_the_remedy_trains_and_accounts_for_the_union_of_the_ranks_batches() -> None:
    one, other = pair().run(dealt, (0, 0))
    assert not set(one[0]) & set(other[0])
    # Batches of 5 on each rank, 10 of both, of 41 items: four steps, a quarter each.
    assert one[1:] == other[1:] == [10.0, [(1.0, 0.25, 4)]]


def test_samplers_that_shuffle_otherwise_on_each_rank_are_refused() -> None:
    one, other = pair().run(dealt, (0, 1))
    assert one == other
    text = (
        "The ranks differ in the DistributedSampler's (shuffle, seed, epoch, drop_last): "
        "(True, 0, 0, True), (True, 1, 0, True). Each rank draws"
    )
    assert one.startswith(f"ValueError: {text}")
