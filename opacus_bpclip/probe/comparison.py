"""Comparisons of a module's outputs for the same examples in two batches.

The companions of an example are the other examples in its batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Where a tensor holds its examples.

    Attributes:
        axis: the axis whose size grows with the number of examples.
        inner: whether an example's entries on this axis are ``B`` apart, and not side by side.
    """

    axis: int
    inner: bool


@dataclass(frozen=True)
class Companions:
    """The same examples in two batches.

    Attributes:
        before: the number of examples in the first batch.
        after: the number of examples in the second batch.
        rows: the compared examples' rows in the first batch.
        places: their rows in the second batch.
    """

    before: int
    after: int
    rows: Sequence[int]
    places: Sequence[int]


def partitions(count: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield ways to divide examples in two parts, so that any two examples are once apart."""
    for bit in range((count - 1).bit_length()):
        sides: tuple[list[int], list[int]] = ([], [])
        for row in range(count):
            sides[row >> bit & 1].append(row)
        yield sides


def layouts(one: torch.Size, other: torch.Size, companions: Companions) -> list[Layout] | None:
    """Return where a tensor may hold its examples, judged by its shapes in batches of two sizes.

    ``None`` means that it holds entries for *pairs* of examples. An empty list means that no axis
    is the batch axis.
    """
    before, after = companions.before, companions.after
    if len(one) != len(other):
        return []
    axes = [
        axis
        for axis, (size, less) in enumerate(zip(one, other, strict=True))
        if size != less and size * after == less * before and size % max(before, 1) == 0
    ]
    if len(axes) > 1:
        return None
    inner = (False, True) if axes and one[axes[0]] > before else (False,)
    return [Layout(axis, flag) for axis in axes for flag in inner]


def differ(
    one: Tensor, other: Tensor, where: Sequence[Layout], companions: Companions, tolerance: float
) -> bool:
    """Return whether, in every layout, the compared rows differ between the two batches."""
    one, other = _overlap(one, other, {layout.axis for layout in where})
    for layout in where:
        before = _picked(_rows(one, layout, companions.before), companions.rows)
        after = _picked(_rows(other, layout, companions.after), companions.places)
        if close(before, after, tolerance):
            return False
    return True


def vanish(
    one: Tensor, other: Tensor, where: Sequence[Layout], companions: Companions, tolerance: float
) -> bool:
    """Return whether, in every layout, compared rows are nowhere in the other batch."""
    if not differ(one, other, where, companions, tolerance):
        return False
    one, other = _overlap(one, other, {layout.axis for layout in where})
    for layout in where:
        after = _rows(other, layout, companions.after)
        found = [
            bool((distance(row, after) <= tolerance).any())
            for row in _rows(one, layout, companions.before)
        ]
        if sum(found) >= len(companions.rows):
            return False
    return True


def fitting(
    where: Iterable[Layout], one: Tensor, other: Tensor, companions: Companions
) -> list[Layout]:
    """Return the layouts in which each example has as many rows; packed sequences have not."""
    pairs = ((one, max(companions.before, 1)), (other, max(companions.after, 1)))
    return [
        layout for layout in where if all(x.shape[layout.axis] % count == 0 for x, count in pairs)
    ]


def _rows(x: Tensor, layout: Layout, count: int) -> Tensor:
    x = x.movedim(layout.axis, 0)
    if layout.inner:
        x = x.unflatten(0, (x.shape[0] // count, count)).transpose(0, 1)
    return x.reshape(count, x.numel() // max(count, 1))


def _picked(x: Tensor, rows: Sequence[int]) -> Tensor:
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    regular = step > 0 and list(rows) == list(range(rows[0], rows[-1] + 1, step))
    # Prefer a view, which copies nothing.
    return x[rows[0] : rows[-1] + 1 : step] if regular else x[list(rows)]


def _overlap(one: Tensor, other: Tensor, batch: set[int]) -> tuple[Tensor, Tensor]:
    # Sequences may be padded to the batch's longest: compare the positions that both tensors have.
    for axis, (size, less) in enumerate(zip(one.shape, other.shape, strict=True)):
        if axis not in batch:
            one, other = (x.narrow(axis, 0, min(size, less)) for x in (one, other))
    return one, other


def close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Return whether no entry differs by more than the tolerance, relative to the largest entry."""
    if not one.numel():
        return True
    # Torch does not subtract floats of eight bits.
    gap = _largest(one - other) if one.itemsize > 1 else torch.inf
    if gap < torch.inf:
        # All numbers are finite: this comparison is enough, and the fastest.
        return gap <= tolerance * max(_largest(one), torch.finfo(torch.float64).tiny)
    return bool(distance(one, other).max() <= tolerance)


def equal(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 0.0) -> bool:
    """Return whether tensors are equal one by one, each up to the tolerance."""
    return len(ours) == len(theirs) and all(
        (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
        and (not x.numel() or bool(distance(x[None], y[None]).max() <= tolerance))
        for x, y in zip(ours, theirs, strict=True)
    )


def _largest(x: Tensor) -> float:
    smallest, largest = torch.aminmax(x)
    return max(-float(smallest), float(largest))  # nan if there is any


def distance(one: Tensor, other: Tensor) -> Tensor:
    """Return each row's largest difference, relative to the largest entry of all rows.

    Args:
        one: ``[..., D]``, one row for each index of the leading axes.
        other: a tensor that can be broadcast against it.

    Returns:
        The differences, of the leading axes' shape; infinite where only one entry is finite.
    """
    if torch.equal(one, other) or not one.shape[-1]:
        return one.new_zeros(one.shape[:-1])
    one, other = one.double(), other.double()
    scale = one.abs().nan_to_num(nan=0.0, posinf=0.0).amax().clamp(min=torch.finfo(one.dtype).tiny)
    alike = (one == other) | (one.isnan() & other.isnan())
    gap = torch.where(alike, 0.0, ((one - other).abs() / scale).nan_to_num(nan=torch.inf))
    return gap.amax(dim=-1)
