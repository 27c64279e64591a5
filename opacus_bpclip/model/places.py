"""Where a tensor holds the examples of the batch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Place(NamedTuple):
    """The axis of a tensor that holds the examples.

    Attributes:
        axis: which one.
        entries: how many entries of each example it holds, as windows of an image.
        inner: whether an example's entries are a stride apart, not side by side.
    """

    axis: int = 0
    entries: int = 1
    inner: bool = False

    def fits(self, x: Tensor, examples: int) -> bool:
        """Return whether a tensor may hold so many examples at this place."""
        return x.dim() > self.axis and x.shape[self.axis] == self.entries * examples

    def rows(self, x: Tensor, examples: int) -> Tensor:
        """Return a tensor with one row for each example, ``[B, *]``.

        A row has the axes that ``x`` has: on `axis` it holds its own entries alone.

        Example:
            >>> import torch
            >>> Place(0, entries=2).rows(torch.arange(6), 3).tolist()
            [[0, 1], [2, 3], [4, 5]]
            >>> Place(0, entries=2, inner=True).rows(torch.arange(6), 3).tolist()
            [[0, 3], [1, 4], [2, 5]]
        """
        sizes = (self.entries, examples) if self.inner else (examples, self.entries)
        return x.unflatten(self.axis, sizes).movedim(self.axis + self.inner, 0)

    def put_back(self, rows: Tensor) -> Tensor:
        """Return the tensor that `rows` was made from."""
        x = rows.movedim(0, self.axis + self.inner)
        return x.flatten(self.axis, self.axis + 1)
