"""Where a tensor holds the examples of the batch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Place(NamedTuple):
    """The axis of a tensor that holds the examples.

    Attributes:
        axis: which one.
        folded: whether it holds several entries of each example, as windows of an image do.
        inner: whether an example's entries are a stride apart, not side by side.
    """

    axis: int = 0
    folded: bool = False
    inner: bool = False

    def entries(self, size: int, examples: int) -> int | None:
        """Return how many entries each example has on an axis of this size, ``None`` if none fit.

        Args:
            size: of the axis.
            examples: how many there are.
        """
        if not self.folded:
            return 1 if size == examples else None
        if not examples:
            return 1 if size == 0 else None
        return size // examples if size and size % examples == 0 else None

    def fits(self, x: Tensor, examples: int) -> bool:
        """Return whether a tensor may hold so many examples at this place."""
        return x.dim() > self.axis and self.entries(x.shape[self.axis], examples) is not None

    def rows(self, x: Tensor, examples: int) -> Tensor:
        """Return a tensor with one row for each example, ``[B, *]``.

        A row has the axes that ``x`` has: on `axis` it holds its own entries alone.

        Example:
            >>> import torch
            >>> Place(0, folded=True).rows(torch.arange(6), 3).tolist()
            [[0, 1], [2, 3], [4, 5]]
            >>> Place(0, folded=True, inner=True).rows(torch.arange(6), 3).tolist()
            [[0, 3], [1, 4], [2, 5]]
        """
        entries = self.entries(x.shape[self.axis], examples)
        assert entries is not None
        sizes = (entries, examples) if self.inner else (examples, entries)
        return x.unflatten(self.axis, sizes).movedim(self.axis + self.inner, 0)

    def put_back(self, rows: Tensor) -> Tensor:
        """Return the tensor that `rows` was made from."""
        x = rows.movedim(0, self.axis + self.inner)
        return x.flatten(self.axis, self.axis + 1)
