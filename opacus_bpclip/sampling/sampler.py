"""The sampler of the private loader: Poisson samples that are counted, and never drawn twice."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from typing_extensions import Self

from opacus_bpclip.guard.generators import renewed
from opacus_bpclip.sampling.log import SampleLog

Copied = TypeVar("Copied")


class CountedSampler(UniformWithReplacementSampler):
    """Opacus's Poisson sampler, with a log of the batches that it draws.

    Every loader that is made from the private one (by ``BatchMemoryManager``, Lightning or
    accelerate) keeps its batch sampler, so all of them write to the same log.

    Args:
        num_samples: the number of items in the data set.
        part: the indices that this sampler draws from; ``None`` for all.
        **options: further arguments of Opacus's sampler.

    Raises:
        ValueError: there are no items to draw from.

    Attributes:
        samples: the log; it records the number of items in each batch.
    """

    generator: torch.Generator | None

    def __init__(self, *, num_samples: int, part: range | None = None, **options: Any) -> None:
        self.part = range(num_samples) if part is None else part
        super().__init__(num_samples=len(self.part), **options)
        self.samples = SampleLog()

    def renew(self) -> None:
        """Draw from now on from numbers of the operating system."""
        self.generator = renewed(self.generator, torch.device("cpu"))

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What was pickled may be loaded twice, and the original goes on.
        self.__dict__.update(state)
        self.renew()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy that shares the generator: a copied one would draw the same samples."""
        return sharing(self, self.generator, memo)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: a rank keeps its items in all epochs, unlike with Opacus's sampler."""

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


def sharing(original: Copied, generator: torch.Generator | None, memo: dict[int, Any]) -> Copied:
    """Return a deep copy that has the generator itself."""
    copied = object.__new__(type(original))
    memo[id(original)], memo[id(generator)] = copied, generator
    copied.__dict__.update(copy.deepcopy(vars(original), memo))
    return copied
