"""Checks of a user's collate function: one row for each item, made of that item alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from opacus_bpclip.probe.leaves import batch_leaves
from opacus_bpclip.probe.randomness import repeatable

# Items that are collated together, and each beside copies of itself.
_TOGETHER = 5
# Relative; far above the rounding of a row that is made in a batch.
_TOLERANCE = 1e-3


def problem_of_collating(loader: DataLoader[Any], *, axis: int) -> str | None:
    """Check that a loader's collate function makes one row of each item, of that item alone.

    Args:
        loader: the user's loader.
        axis: the batch axis of a tensor.
    """
    return _several_rows(loader, axis=axis) or _coupled_rows(loader, axis=axis)


def _several_rows(loader: DataLoader[Any], *, axis: int) -> str | None:
    """Check that each item becomes one row.

    The check collates 3 and 4 copies of the first item, and compares the sizes of the batch axis.
    If none changes there, one that changes as the number of items on another axis has them all in
    one row. Where no tensor's size changes, the rows are checked in training.
    """
    try:
        with repeatable(torch.device("cpu")):
            item = loader.dataset[0]
            batches = [loader.collate_fn([item] * count) for count in (3, 4)]
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

    The first items are collated for this. Nothing is found where the collate function is random,
    or where it makes tensors of other sizes: what padding does is for the model to show.
    """
    if loader.collate_fn is default_collate:
        return None
    try:
        with repeatable(torch.device("cpu")):
            items = [loader.dataset[index] for index in range(_TOGETHER)]
            batches = [items, items, *([item] * _TOGETHER for item in items)]
            together, again, *alone = (_rows(loader.collate_fn(list(own)), axis) for own in batches)
    except Exception:
        # The user's own code, whose error training will report.
        return None
    if not together[0] or not all(map(_may_be_alike, together, again)):
        return None
    # The collate function may sort the items, and write an item's place into its row.
    fits = [
        [any(_may_be_alike(row, own) for own in copies) for row in together] for copies in alone
    ]
    if np.array(fits)[linear_sum_assignment(fits, maximize=True)].all():
        return None
    return (
        "The data loader's collate_fn makes another row of an item beside other items than beside "
        "copies of itself (statistics of the batch, a mixture of items, negatives from the "
        "batch?). So one example changes the rows of the others, and no noise covers that. Make "
        "each item's row of that item alone: normalise by public constants, for example, and mix "
        "within an item."
    )


def _rows(batch: Any, axis: int) -> list[list[Tensor]]:
    """Return each item's row of all tensors that have one for each item."""
    tensors = [
        leaf
        for leaf in batch_leaves(batch)
        if _has_axis(leaf, axis) and leaf.shape[axis] == _TOGETHER
    ]
    return [[leaf.select(axis, row) for leaf in tensors] for row in range(_TOGETHER)]


def _may_be_alike(row: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Return whether two rows are equal, or of sizes that cannot be compared."""
    if [x.shape for x in row] != [x.shape for x in other]:
        return True
    return all(map(_equal, row, other))


def _equal(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    scale = float(one.nan_to_num().abs().amax()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE * scale, equal_nan=True)


def _has_axis(leaf: object, axis: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > axis
