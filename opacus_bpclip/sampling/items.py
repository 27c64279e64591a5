"""The items that a user's data loader draws from: the private loader draws from the same ones.

Poisson sampling replaces the loader's sampler. This may change the order of the items and which of
them are in a batch together. It must not change which items there are, or draw an item more often.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from opacus_bpclip.guard.ranks import world_size
from opacus_bpclip.probe.randomness import repeatable
from opacus_bpclip.sampling.repeats import count_of_repeats

# How a loader reads and collates, whatever it draws.
_READING = (
    "collate_fn",
    "multiprocessing_context",
    "num_workers",
    "persistent_workers",
    "pin_memory",
    "prefetch_factor",
    "timeout",
    "worker_init_fn",
)

_REMEDY = (
    "Pass a DataLoader with batch_size (and shuffle=True, if you like) over the items to train "
    "on; torch.utils.data.Subset(dataset, indices) makes a data set of some of them. To keep "
    "your own sampling, with an epsilon that you derive yourself, use "
    "make_private(poisson_sampling=False)."
)


def sampled_items(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader whose data set holds exactly the items that ``loader`` draws from.

    Args:
        loader: the user's loader; it is returned if it draws from all items of its data set.

    Raises:
        ValueError: Poisson sampling cannot replace the loader's sampler, it has no batches, or the
            data set has an item several times.
    """
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "Uniform sampling is not supported for IterableDataset: the items of a stream cannot "
            f"be drawn by index. {_REMEDY}"
        )
    if repeats := count_of_repeats(loader.dataset):
        raise ValueError(
            f"The data set has {repeats} items more than once (a Subset whose indices repeat, a "
            "ConcatDataset of one data set several times). Each copy is sampled and clipped by "
            "itself, so one example would contribute several times. Name each item once. For "
            "several augmented views of an item, use opacus_bpclip.AugmentedViews; for rare "
            "classes, weights in the loss, which are public numbers."
        )
    batches = loader.batch_sampler
    size = len(loader.dataset)  # type: ignore[arg-type]
    if isinstance(batches, UniformWithReplacementSampler) and batches.num_samples == size:
        return loader  # Poisson sampling from the same items
    if batches is None:
        raise ValueError(
            f"The data loader has batch_size=None, so the expected batch size is unknown. {_REMEDY}"
        )
    if type(batches) is not BatchSampler:
        raise ValueError(
            f"The data loader has a batch sampler of its own ({type(batches).__name__}), which "
            f"Poisson sampling would replace. {_REMEDY}"
        )
    if not len(loader):
        raise ValueError(
            f"The data loader has no batch: fewer items than batch_size, and drop_last. {_REMEDY}"
        )
    # loader.sampler is a placeholder where a batch sampler was passed.
    indices = _subset(batches.sampler, size)
    if indices is None:
        return loader
    return like(
        loader,
        Subset(loader.dataset, indices),
        batch_size=batches.batch_size,
        drop_last=batches.drop_last,
        generator=loader.generator,
    )


def like(loader: DataLoader[Any], dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
    """Return a loader that reads and collates as another one does.

    Args:
        loader: the other one; what it draws from, and how, is not taken over.
        dataset: the data set.
        **options: further arguments of ``torch.utils.data.DataLoader``.
    """
    return DataLoader(dataset, **{name: getattr(loader, name) for name in _READING}, **options)


def _subset(sampler: Any, size: int) -> Sequence[int] | None:
    """Return the indices of a sampler that draws each of them once; ``None`` for all items.

    Raises:
        ValueError: the sampler draws some items more often than others, or may draw different
            items in each epoch.
    """
    if type(sampler) is SequentialSampler and len(sampler) == size:
        return None
    if type(sampler) is DistributedSampler and sampler.num_replicas == world_size():
        return None  # all ranks together draw all items
    if type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == size:
        return None
    if type(sampler) is SubsetRandomSampler:
        indices = list(sampler.indices)
        if len(set(indices)) < len(indices):
            raise ValueError(
                "The data loader's SubsetRandomSampler names an item twice: it would contribute "
                "twice to a step. Name each item once."
            )
        return indices
    if type(sampler) is not RandomSampler:
        with repeatable(torch.device("cpu")):
            drawn = sorted(sampler) if len(sampler) == size else []
        if drawn == list(range(size)):
            return None  # all items in another order
    raise ValueError(
        f"The data loader's {type(sampler).__name__} does not draw each item once. Poisson "
        "sampling would replace it, and change the sampling rate, the expected batch size and the "
        f"choice of items. {_REMEDY}"
    )
