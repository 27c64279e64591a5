"""The place of the batch in a tensor."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Place(NamedTuple):
    """The axis of a tensor that holds the examples, perhaps folded with another axis.

    Attributes:
        axis: the axis.
        entries: the number of entries of each example on it, such as windows of an image.
        inner: whether the examples vary fastest along the axis, so that the entries of one example
            are not adjacent.
    """

    axis: int = 0
    entries: int = 1
    inner: bool = False

    def fits(self, x: Tensor, examples: int) -> bool:
        """Return whether the size of the axis is right for this number of examples."""
        return x.dim() > self.axis and x.shape[self.axis] == self.entries * examples

    def rows(self, x: Tensor, examples: int) -> Tensor:
        """Return a tensor with one row for each example, ``[B, *]``.

        A row has the same axes as ``x``, with the example's own entries on `axis`.

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
        """Undo `rows`: return the tensor that these rows were taken from."""
        x = rows.movedim(0, self.axis + self.inner)
        return x.flatten(self.axis, self.axis + 1)
