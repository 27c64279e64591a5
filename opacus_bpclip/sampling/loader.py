"""The private data loader: counted Poisson samples, also empty ones, and batches filled up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from opacus.data_loader import DPDataLoader
from opacus.utils.batch_memory_manager import wrap_data_loader
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from opacus_bpclip.probe.leaves import batch_leaves
from opacus_bpclip.probe.randomness import repeatable
from opacus_bpclip.sampling.log import SampleLog
from opacus_bpclip.sampling.padding import with_rows

Collate = Callable[[list[Any]], Any]


class CountedSampler(UniformWithReplacementSampler):
    """Opacus's Poisson sampler, which notes what it draws.

    Every loader that is made from the private one (by ``BatchMemoryManager``, Lightning or
    accelerate) keeps its batch sampler, so the count does not depend on who iterates.

    Args:
        num_samples: how many items the data set has.
        part: which of them this sampler draws from; ``None`` for all.
        **options: as for Opacus's.

    Raises:
        ValueError: there are none.

    Attributes:
        samples: where it notes the number of items of each batch.
    """

    def __init__(self, *, num_samples: int, part: range | None = None, **options: Any) -> None:
        self.part = range(num_samples) if part is None else part
        super().__init__(num_samples=len(self.part), **options)
        self.samples = SampleLog()

    def set_epoch(self, epoch: int) -> None:
        """Do nothing, where Opacus's distributed sampler deals the items out anew."""

    def __iter__(self) -> Iterator[list[int]]:
        samples, begun = self.samples, self.samples.begin()
        left = True
        try:
            for indices in super().__iter__():
                samples.draw(len(indices), begun)
                yield [self.part[index] for index in indices]
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

    Attributes:
        rows: of what a batch's number of rows is to be a multiple, at least once: it is filled up
            with zeros. ``None`` leaves it as it is.
    """

    def __init__(self, collate: Collate, dataset: Dataset[Any]) -> None:
        self.collate = collate
        self.dataset = dataset
        self.rows: int | None = None
        self._form: tuple[Any, Any] | None = None

    def __call__(self, items: list[Any]) -> Any:
        """Collate a batch."""
        made = self.collate(items) if items else with_rows(*self._empty(), items=1, rows=0)
        if self.rows is None:
            return made
        rows = max(1, -(-len(items) // self.rows)) * self.rows
        if rows == len(items):
            return made
        return with_rows(made, *self._empty()[1:], items=len(items), rows=rows)

    def _empty(self) -> tuple[Any, Any, Any]:
        """Return what shows the form of a batch: one of the first item, twice, and of two."""
        if self._form is None:
            with repeatable(torch.device("cpu")):
                item = self.dataset[0]
                self._form = self.collate([item]), self.collate([item] * 2)
        one, two = self._form
        return one, one, two


class PrivateDataLoader(DPDataLoader):
    """Opacus's Poisson loader with a `CountedSampler` and `CollateWithEmpty`.

    Args:
        dataset: the data set.
        sample_rate: the probability with which each item is in a batch.
        collate_fn: as for ``torch.utils.data.DataLoader``.
        generator: of the sampling.
        drop_last: ignored, as in Opacus.
        distributed: whether every rank of the process group draws from items of its own.
        batch_first: ignored: the batch axis is found.
        rand_on_empty: must be ``False``.
        **options: as for ``torch.utils.data.DataLoader``.
    """

    batch_sampler: CountedSampler
    collate_fn: CollateWithEmpty
    _rows: int | None = None
    _parts: DataLoader[Any] | None = None

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
        assert not rand_on_empty
        self.sample_rate = sample_rate
        self.distributed = distributed
        # Not Opacus's own __init__, which looks into the first item and supports few kinds.
        DataLoader.__init__(
            self,
            dataset,
            batch_sampler=CountedSampler(
                num_samples=len(dataset),  # type: ignore[arg-type]
                part=part_of_rank(len(dataset)) if distributed else None,  # type: ignore[arg-type]
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

    def in_constant_shape(self, rows: int) -> None:
        """Yield physical batches of exactly so many rows: parts of a sample, filled up with zeros.

        A sample of ``n`` items makes ``max(1, ceil(n / rows))`` of them, each announced as
        `BatchMemoryManager` announces its own. Whoever rebuilds the loader of its parts gets whole
        samples, filled up to a multiple of ``rows``.

        Args:
            rows: how many.
        """
        self._rows = self.collate_fn.rows = rows
        self.samples.is_padded = True

    def __iter__(self) -> Any:
        """Yield batches, physical ones where their shape is constant."""
        if self._rows is None:
            return super().__iter__()
        # Made anew, as somebody may have changed an option; kept only with its workers.
        if self._parts is None or not self.persistent_workers:
            self._parts = wrap_data_loader(
                data_loader=self, max_batch_size=self._rows, optimizer=_Announcing(self.samples)
            )
        return iter(self._parts)


class _Announcing:
    """What Opacus's splitting sampler takes for an optimizer: it tells the log of each part."""

    def __init__(self, samples: SampleLog) -> None:
        self.samples = samples

    def signal_skip_step(self, do_skip: bool) -> None:
        """Announce a physical batch."""
        self.samples.signal(do_skip)


def part_of_rank(items: int) -> range:
    """Return this rank's items: each item is one rank's, in every epoch the same one's.

    Not in another order in each epoch, as Opacus's sampler has it: a rank that is not told of the
    epoch would draw items that another one draws, too.

    Args:
        items: how many the data set has.
    """
    return range(dist.get_rank(), items, dist.get_world_size())


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
