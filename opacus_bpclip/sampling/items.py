"""Which items a user's data loader reaches: the private loader samples from those, and no others.

Poisson sampling replaces a loader's sampler. That may change the order of items and which of them
meet in a batch; it must not change which items there are, or how often each may be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from opacus_bpclip.guard.ranks import world_size
from opacus_bpclip.probe.randomness import repeatable

_REMEDY = (
    "Pass a DataLoader with batch_size (and shuffle=True, if you like) over the items to train "
    "on; torch.utils.data.Subset(dataset, indices) makes a data set of some of them. With a "
    "sampling of your own, and an epsilon that you derive yourself, use "
    "make_private(poisson_sampling=False)."
)


def sampled_items(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader whose data set is what ``loader`` reaches; itself if that is all of its own.

    Args:
        loader: the user's.

    Raises:
        ValueError: its sampler, or its lack of batches, cannot be replaced by Poisson sampling.
    """
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "Uniform sampling is not supported for IterableDataset: a stream has no items that "
            f"could be drawn. {_REMEDY}"
        )
    batches = loader.batch_sampler
    size = len(loader.dataset)  # type: ignore[arg-type]
    if isinstance(batches, UniformWithReplacementSampler) and batches.num_samples == size:
        return loader  # Poisson sampling from the same items
    if batches is None:
        raise ValueError(
            "The data loader has batch_size=None, so nothing says how many items to expect in a "
            f"batch. {_REMEDY}"
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
    # Not the loader's own attribute, which is a stand-in where a batch sampler was passed.
    indices = _subset(batches.sampler, size)
    if indices is None:
        return loader
    return DataLoader(
        Subset(loader.dataset, indices),
        batch_size=batches.batch_size,
        drop_last=batches.drop_last,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def _subset(sampler: Any, size: int) -> Sequence[int] | None:
    """Return the items of a sampler that draws each of some items once; ``None`` for all.

    Raises:
        ValueError: it draws some more often than others, or other ones in each epoch.
    """
    if type(sampler) is SequentialSampler and len(sampler) == size:
        return None
    if type(sampler) is DistributedSampler and sampler.num_replicas == world_size():
        return None  # of all ranks together
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
            return None  # another order of all of them
    raise ValueError(
        f"The data loader's {type(sampler).__name__} does not draw each item once: Poisson "
        "sampling would replace it, with another sampling rate, expected batch size and choice of "
        f"items than it says. {_REMEDY}"
    )
