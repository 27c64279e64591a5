"""The private data loader: Poisson samples that are counted, and empty ones in the batch's form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from opacus.data_loader import DPDataLoader
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from opacus_bpclip.probe.leaves import batch_leaves, map_leaves, parts_of
from opacus_bpclip.probe.randomness import repeatable
from opacus_bpclip.sampling.log import SampleLog

Collate = Callable[[list[Any]], Any]


class CountedSampler(UniformWithReplacementSampler):
    """Opacus's Poisson sampler, which notes what it draws.

    Every loader that is made from the private one (by ``BatchMemoryManager``, Lightning or
    accelerate) keeps its batch sampler, so the count does not depend on who iterates.

    Attributes:
        samples: where it notes the number of items of each batch.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.samples = SampleLog()

    def __iter__(self) -> Iterator[list[int]]:
        samples, begun = self.samples, self.samples.begin()
        left = True
        try:
            for indices in super().__iter__():
                samples.draw(len(indices), begun)
                yield indices
            left = False
        finally:
            samples.end(begun, left=left)


class CollateWithEmpty:
    """A collate function that also collates no items, into a batch of the usual form.

    An empty batch has the structure, the dtypes and the other axes of a batch of the data set's
    first item, all of which are public.

    Args:
        collate: collates one item or more.
        dataset: gives the first item.
    """

    def __init__(self, collate: Collate, dataset: Dataset[Any]) -> None:
        self.collate = collate
        self.dataset = dataset

    def __call__(self, items: list[Any]) -> Any:
        """Collate a batch."""
        if items:
            return self.collate(items)
        with repeatable(torch.device("cpu")):
            item = self.dataset[0]
            one, two = self.collate([item]), self.collate([item] * 2)
        return _emptied(one, two)


class PrivateDataLoader(DPDataLoader):
    """Opacus's Poisson loader with a `CountedSampler` and `CollateWithEmpty`.

    Args:
        dataset: the data set.
        sample_rate: the probability with which each item is in a batch.
        collate_fn: as for ``torch.utils.data.DataLoader``.
        generator: of the sampling.
        drop_last: ignored, as in Opacus.
        distributed: must be ``False``.
        batch_first: ignored: the batch axis is found.
        rand_on_empty: must be ``False``.
        **options: as for ``torch.utils.data.DataLoader``.
    """

    batch_sampler: CountedSampler

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        sample_rate: float,
        collate_fn: Collate,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
        distributed: bool = False,
        batch_first: bool = True,
        rand_on_empty: bool = False,
        **options: Any,
    ) -> None:
        assert not distributed
        assert not rand_on_empty
        self.sample_rate = sample_rate
        self.distributed = distributed
        # Not Opacus's own __init__, which looks into the first item and supports few kinds.
        DataLoader.__init__(
            self,
            dataset,
            batch_sampler=CountedSampler(
                num_samples=len(dataset),  # type: ignore[arg-type]
                sample_rate=sample_rate,
                generator=generator,
            ),
            collate_fn=CollateWithEmpty(collate_fn, dataset),
            generator=generator,
            **options,
        )

    @property
    def samples(self) -> SampleLog:
        """Return the log of what was drawn."""
        return self.batch_sampler.samples


def several_rows(loader: DataLoader[Any], *, axis: int) -> str | None:
    """Say that a loader's collate function makes several rows of an item.

    Found on copies of the first item: their number must be the size of the batch axis. Where no
    axis grows with it, nothing is known, and the batch will show.

    Args:
        loader: the user's own.
        axis: which axis of a tensor is the batch.
    """
    try:
        with repeatable(torch.device("cpu")):
            item = loader.dataset[0]
            batches = [loader.collate_fn([item] * count) for count in (3, 4)]
        sizes = [
            [leaf.shape[axis] for leaf in batch_leaves(batch) if _has_axis(leaf, axis)]
            for batch in batches
        ]
    except Exception:
        # Somebody else's code, which training will run and report.
        return None
    growing = [pair for pair in zip(*sizes, strict=False) if pair[0] != pair[1]]
    if not growing or (3, 4) in growing:
        return None
    rows = growing[0]
    return (
        f"The data loader's collate_fn makes {rows[1]} rows of 4 items (crops, views, copies?). "
        "The bound holds for one row of each item: an item with several rows contributes several "
        "times as much. Make one row of each item, for example one crop, drawn anew each time."
    )


def _has_axis(leaf: object, axis: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > axis


def _emptied(one: Any, two: Any) -> Any:
    """Return a batch of one item without it; ``two`` has it twice."""
    if isinstance(one, Tensor):
        for axis, (size, other) in enumerate(zip(one.shape, two.shape, strict=True)):
            if size != other:
                return one.narrow(axis, 0, 0).clone()
        return one
    if type(one) is dict:
        return {key: _emptied(value, two[key]) for key, value in one.items()}
    if isinstance(one, list) and len(one) != len(two):
        return []
    if type(one) in (list, tuple):
        return type(one)(_emptied(x, y) for x, y in zip(one, two, strict=True))
    if parts_of(one) is None:
        return one
    pairs = zip(batch_leaves(one), batch_leaves(two), strict=True)
    partner = {id(leaf): other for leaf, other in pairs}
    return map_leaves(one, lambda leaf: _emptied(leaf, partner[id(leaf)]))
