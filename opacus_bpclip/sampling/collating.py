"""Checks of a user's collate function: one row for each item, made of that item alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils.data import DataLoader, Subset, default_collate

from opacus_bpclip.probe.leaves import batch_leaves
from opacus_bpclip.probe.randomness import repeatable

# Items that are collated together, and each beside copies of itself.
_TOGETHER = 5
# Relative to a number, and to the largest one in its place of any item; far above the rounding of a
# row that is made in a batch.
_TOLERANCE = 1e-4


def problem_of_collating(loader: DataLoader[Any], *, axis: int) -> str | None:
    """Check that a loader's collate function makes one row of each item, of that item alone.

    Args:
        loader: the user's loader.
        axis: the batch axis of a tensor.
    """
    problem = _several_rows(loader, axis=axis)
    if problem is None and _coupled_rows(loader, axis=axis):
        # Look twice: a generator of the user's own may have made the difference.
        problem = _coupled_rows(loader, axis=axis)
    return problem


def _several_rows(loader: DataLoader[Any], *, axis: int) -> str | None:
    """Check that each item becomes one row.

    The check collates 3 and 4 copies of the first item, and compares the sizes of the batch axis.
    If none changes there, one that changes as the number of items on another axis has them all in
    one row. Where no tensor's size changes, the rows are checked in training.
    """
    try:
        item = _read(loader.dataset, [0])
        batches = [_collated(loader, item * count) for count in (3, 4)]
        shapes = [
            [leaf.shape for leaf in batch_leaves(batch) if _has_axis(leaf, axis)]
            for batch in batches
        ]
    except Exception:
        # The user's own code, whose error training will report.
        return None
    pairs = list(zip(*shapes, strict=False))
    growing = [(one[axis], other[axis]) for one, other in pairs if one[axis] != other[axis]]
    if not growing and axis == 0 and any(_joined(*pair) for pair in pairs if pair[0][0] == 1):
        return (
            "The data loader's collate_fn puts all items one after the other into one row (a "
            "flattening or packing collator), and a row counts as one example. Make one row of "
            "each item: pad them to one length, and mask the padding."
        )
    if not growing or (3, 4) in growing:
        return None
    rows = growing[0]
    return (
        f"The data loader's collate_fn makes {rows[1]} rows of 4 items (crops, views, copies?). "
        "The bound holds for one row of each item: an item with several rows contributes several "
        "times as much. Make one row of each item, for example one crop, drawn anew each time; or "
        "make items that hold all views, which opacus_bpclip.AugmentedViews and FoldViews measure "
        "together."
    )


def _joined(one: Sequence[int], other: Sequence[int]) -> bool:
    """Return whether some axis grows as the number of items from 3 to 4."""
    return any(0 < 4 * short == 3 * long for short, long in zip(one, other, strict=False))


def _coupled_rows(loader: DataLoader[Any], *, axis: int) -> str | None:
    """Check that an item's row is the same beside other items as beside copies of itself.

    The first items are read and collated for this, each time with the same random numbers. Nothing
    is found where they come from a generator of the user's own, or where tensors have other sizes:
    what padding does is for the model to show.
    """
    if loader.collate_fn is default_collate and not _reads_at_once(loader.dataset):
        return None
    try:
        first = list(range(_TOGETHER))
        items = _read(loader.dataset, first)
        copies = [[item] * _TOGETHER for item in items]
        if _reads_at_once(loader.dataset):
            copies = [_read(loader.dataset, [index] * _TOGETHER) for index in first]
        read = (items, items, *copies)
        together, again, *alone = (_rows(_collated(loader, own), axis) for own in read)
    except Exception:
        # The user's own code, whose error training will report.
        return None
    alike = partial(_may_be_alike, scales=_scales(together))
    if not together[0] or not all(map(alike, together, again)):
        return None
    # The collate function may sort the items, and write an item's place into its row.
    fits = [[any(alike(row, own) for own in batch) for row in together] for batch in alone]
    if np.array(fits)[linear_sum_assignment(fits, maximize=True)].all():
        return None
    return (
        "The data loader's collate_fn makes another row of an item beside other items than beside "
        "copies of itself (statistics of the batch, a mixture of items, negatives from the "
        "batch?). So one example changes the rows of the others, and no noise covers that. Make "
        "each item's row of that item alone: normalise by public constants, for example, mix "
        "within an item, and leave numbers about the whole batch out of it."
    )


def _rows(batch: Any, axis: int) -> list[list[Tensor]]:
    """Return each item's row of all tensors that have one for each item."""
    tensors = [
        leaf
        for leaf in batch_leaves(batch)
        if _has_axis(leaf, axis) and leaf.shape[axis] == _TOGETHER
    ]
    return [[leaf.select(axis, row) for leaf in tensors] for row in range(_TOGETHER)]


def _scales(rows: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the largest size that each number has in any of the rows, for each tensor."""
    return [torch.stack(own).double().nan_to_num().abs().amax(0) for own in zip(*rows, strict=True)]


def _may_be_alike(
    row: Sequence[Tensor], other: Sequence[Tensor], *, scales: Sequence[Tensor]
) -> bool:
    """Return whether two rows are equal, or of sizes that cannot be compared."""
    if [x.shape for x in row] != [x.shape for x in other]:
        return True
    return all(map(_equal, row, other, scales))


def _equal(one: Tensor, other: Tensor, scale: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    one, other = one.double(), other.double()
    tolerance = _TOLERANCE * torch.maximum(scale, one.abs())
    same = (one == other) | (one.isnan() & other.isnan()) | ((one - other).abs() <= tolerance)
    return bool(same.all())


def _read(dataset: Any, indices: Sequence[int]) -> list[Any]:
    """Return some items, read as a loader reads them, with random numbers of one seed."""
    with repeatable(torch.device("cpu")):
        if getattr(dataset, "__getitems__", None):
            return list(dataset.__getitems__(list(indices)))
        return [dataset[index] for index in indices]


def _collated(loader: DataLoader[Any], items: Sequence[Any]) -> Any:
    """Return the batch of some items, with random numbers of one seed."""
    with repeatable(torch.device("cpu")):
        return loader.collate_fn(list(items))


def _reads_at_once(dataset: Any) -> bool:
    """Return whether a data set makes all items of a batch together."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return bool(getattr(dataset, "__getitems__", None))


def _has_axis(leaf: object, axis: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > axis
