"""The private data loader: Poisson samples that are counted, may be empty, and may be padded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from opacus.data_loader import DPDataLoader
from opacus.utils.batch_memory_manager import wrap_data_loader
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Self

from opacus_bpclip.probe.randomness import repeatable
from opacus_bpclip.sampling.log import SampleLog
from opacus_bpclip.sampling.padding import with_rows
from opacus_bpclip.sampling.records import Pass
from opacus_bpclip.sampling.sampler import CountedSampler, sharing

Collate = Callable[[list[Any]], Any]


class CollateWithEmpty:
    """A collate function that can also make an empty batch, and pad a batch with rows of zeros.

    An empty batch has the structure, the dtypes and the other axes of a batch of the data set's
    first item, all of which are public.

    Args:
        collate: collates one item or more.
        dataset: the data set, for its first item.

    Attributes:
        rows: each batch is padded to a multiple of this number of rows, and to at least this
            number. ``None`` adds no rows.
    """

    def __init__(self, collate: Collate, dataset: Dataset[Any]) -> None:
        # A private loader is made private again with a padding of its own, or none.
        self.collate: Collate = (
            collate.collate if isinstance(collate, CollateWithEmpty) else collate
        )
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
        """Return batches of one, one and two copies of the first item, to show a batch's form."""
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
        sample_rate: the probability that an item is in a batch, independently of all others.
        collate_fn: makes a batch of a list of items, see ``torch.utils.data.DataLoader``.
        generator: the source of the sampling's random numbers.
        drop_last: ignored, as in Opacus.
        distributed: whether every rank of the process group draws from items of its own.
        batch_first: ignored: the batch axis is found from batches of different sizes.
        rand_on_empty: must be ``False``.
        **options: further arguments of ``torch.utils.data.DataLoader``.
    """

    batch_sampler: CountedSampler
    collate_fn: CollateWithEmpty
    _rows: int | None = None
    _parts: DataLoader[Any] | None = None
    _announcing: _Announcing

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
        # Without Opacus's __init__, which reads the first item and supports few types of items.
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy that shares the generator: a copied one would draw the same samples."""
        return sharing(self, self.batch_sampler.generator, memo)

    @property
    def samples(self) -> SampleLog:
        """Return the log of the batches drawn."""
        return self.batch_sampler.samples

    def in_parts(self, rows: int) -> None:
        """Yield physical batches: parts of a sample.

        A sample of ``n`` items becomes ``max(1, ceil(n / rows))`` physical batches, announced to
        the log as `BatchMemoryManager` announces its own. The loader's length stays the number of
        samples.

        Args:
            rows: the largest number of rows of a physical batch.
        """
        self._rows = rows

    def in_constant_shape(self, rows: int) -> None:
        """Yield physical batches of constant size: parts of a sample, padded with rows of zeros.

        A loader that other code builds from this one's sampler and collate function yields whole
        samples, padded to a multiple of ``rows``.

        Args:
            rows: the number of rows of each physical batch.
        """
        self.in_parts(rows)
        self.collate_fn.rows = rows
        self.samples.is_padded = True

    def __iter__(self) -> Any:
        """Yield logical batches; physical ones after `in_parts` or `in_constant_shape`."""
        reader = Pass(read=True)
        try:
            # Workers let the sampler begin here, otherwise the first batch does.
            self.samples.announce(reader)
            for batch in self._batches(reader):
                self.samples.hand_over(reader)
                yield batch
        except GeneratorExit:
            reader.left = True
            raise
        finally:
            reader.read = False

    def _batches(self, reader: Pass) -> Iterator[Any]:
        if self._rows is None:
            return super().__iter__()
        # Made for each pass, since the user may change an option; persistent workers must stay.
        if self._parts is None or not self.persistent_workers:
            self._announcing = _Announcing(self.samples)
            self._parts = wrap_data_loader(
                data_loader=self, max_batch_size=self._rows, optimizer=self._announcing
            )
        self._announcing.reader = reader
        return iter(self._parts)


class _Announcing:
    """The optimizer that Opacus's splitting sampler is given: it passes signals to the log."""

    def __init__(self, samples: SampleLog) -> None:
        self.samples = samples
        self.reader: Pass | None = None

    def signal_skip_step(self, do_skip: bool) -> None:
        """Announce a physical batch."""
        self.samples.signal(do_skip, self.reader)


def part_of_rank(items: int) -> range:
    """Return the indices of this rank's items: each item belongs to one rank, in all epochs.

    Opacus's sampler shuffles the items among the ranks in each epoch. A rank whose `set_epoch` was
    not called would then draw from items of another rank.

    Args:
        items: the number of items in the data set.
    """
    return range(dist.get_rank(), items, dist.get_world_size())
