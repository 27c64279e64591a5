"""Whether the data loaders of several ranks have the same items.

Each rank draws from indices of its own in the data set. If the ranks' data sets differ, an example
may be at different indices on two ranks, and contribute to a step twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Subset
from torch.utils.data.distributed import DistributedSampler

from opacus_bpclip.guard.ranks import Ranks
from opacus_bpclip.model.recurrence import is_packed
from opacus_bpclip.probe.leaves import named_leaves
from opacus_bpclip.probe.randomness import repeatable

ONE_DATA_SET = (
    "Each rank draws from its own indices of the data set. If the ranks' data sets differ, two "
    "ranks may have the same example, which then contributes twice what the noise is made for. "
    "Pass the same data set on each rank, not a rank's own part: split and shuffle with one seed, "
    "for example random_split(data, sizes, generator=torch.Generator().manual_seed(0))."
)


def identity(loader: DataLoader[Any]) -> Mapping[str, object]:
    """Return properties of a loader's items by name, equal on ranks that have the same items.

    Hashes of a few items are among them, except of items that cannot be read or that differ when
    they are read twice.

    Args:
        loader: the loader that `make_private` returned.
    """
    size = len(loader.dataset)  # type: ignore[arg-type]
    found: dict[str, object] = {
        "the data set's size": size,
        "the data set's kind": ", ".join(map(str, _kinds(loader.dataset))),
    }
    chosen = [_digest_of_indices(indices) for indices in _chosen(loader.dataset)]
    found["the items that a Subset or SubsetRandomSampler chooses (their hashes)"] = tuple(chosen)
    sampler = sampler_of(loader)
    if isinstance(sampler, DistributedSampler):
        dealt = (sampler.shuffle, sampler.seed, sampler.epoch, sampler.drop_last)
        found["the DistributedSampler's (shuffle, seed, epoch, drop_last)"] = dealt
    for index in sorted({0, 1, size // 2, size - 2, size - 1} & set(range(size))):
        digest = _digest_of_item(loader, index)
        if digest is not None:
            found[f"the data set's item {index} (its hash)"] = digest
    return found


def sampler_of(loader: DataLoader[Any]) -> object:
    """Return a loader's sampler; ``None`` if the user gave it a batch sampler."""
    batches = loader.batch_sampler
    return batches.sampler if type(batches) is BatchSampler else None


def not_dealt_out(loader: DataLoader[Any], ranks: Ranks) -> str | None:
    """Check that a loader that is used as it is gives each item to one rank only.

    Args:
        loader: the user's loader.
        ranks: the ranks that train together.
    """
    if ranks.size == 1:
        return None
    sampler = sampler_of(loader)
    size = _size(loader.dataset)
    if (
        type(sampler) is DistributedSampler
        and (sampler.num_replicas, sampler.rank) == (ranks.size, ranks.rank)
        and _size(sampler.dataset) == size is not None
        and (sampler.drop_last or size % ranks.size == 0)
    ):
        return None
    return (
        f"With poisson_sampling=False, the data loader of rank {ranks.rank} of {ranks.size} does "
        "not give each item to exactly one rank: an example that several ranks have in one step "
        "contributes several times what the noise is made for, and the sampling rate is not the "
        "one that is accounted for. Pass DataLoader(dataset, batch_size=..., "
        "sampler=DistributedSampler(dataset, drop_last=True)) of torch.utils.data, with the "
        "batch_size of each rank, or leave poisson_sampling=False out."
    )


def _size(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:  # a stream
        return None


def _kinds(dataset: Any) -> Iterator[tuple[str, int | None]]:
    """Yield the class and the size of a data set and of the data sets that it wraps."""
    yield type(dataset).__qualname__, _size(dataset)
    for inside in _inside(dataset):
        yield from _kinds(inside)


def _chosen(dataset: Any) -> Iterator[Sequence[Any]]:
    if isinstance(dataset, Subset):
        yield dataset.indices
    for inside in _inside(dataset):
        yield from _chosen(inside)


def _inside(dataset: Any) -> Sequence[Any]:
    if isinstance(dataset, Subset):
        return [dataset.dataset]
    return dataset.datasets if isinstance(dataset, ConcatDataset) else []


def _digest_of_indices(indices: Sequence[Any]) -> str:
    try:
        data = np.asarray([int(index) for index in indices], dtype=np.int64).tobytes()
    except (TypeError, ValueError, OverflowError):  # keys that are not integers
        data = repr(list(indices)).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def _digest_of_item(loader: DataLoader[Any], index: int) -> str | None:
    """Return a hash of a batch of one item; ``None`` if two readings fail or differ."""
    try:
        one, again = (_read(loader, index) for _ in range(2))
    except Exception:
        # The user's own code, whose error training will report.
        return None
    return one if one == again else None


def _read(loader: DataLoader[Any], index: int) -> str:
    with repeatable(torch.device("cpu")):
        batch = loader.collate_fn([loader.dataset[index]])
    digest = hashlib.sha256()
    for path, leaf in named_leaves(batch):
        own = leaf.data if is_packed(leaf) else leaf
        if isinstance(own, Tensor):
            own = own.detach().cpu().contiguous()
            digest.update(repr((path, own.dtype, tuple(own.shape))).encode())
            digest.update(own.flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(own, (bool, int, float, str, bytes)):
            digest.update(repr((path, own)).encode())
    return digest.hexdigest()[:16]
