"""Search for examples whose outputs depend on how far the others of a batch make them padded.

The other searches run batches of one shape. Where a collate function pads its items to the longest
of the batch, one long example changes the inputs of all others. If the model does not leave padding
out (a mean over all positions, the last output of a recurrent network), that changes what they
contribute, and no noise covers it.

So a short item of the data set is collated by itself, and beside a long one. What the model makes
of it must be the same. Where the first items have one length, the long one is a copy with each
sequence doubled. This uses values of the data set, as training does, and only to see whether the
outputs differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from opacus_bpclip.probe import problems
from opacus_bpclip.probe.batches import Batch
from opacus_bpclip.probe.comparison import equal
from opacus_bpclip.probe.copies import Copy, device_of
from opacus_bpclip.probe.forms import calls
from opacus_bpclip.probe.leaves import batch_leaves
from opacus_bpclip.probe.problems import Problem
from opacus_bpclip.probe.randomness import Steady, repeatable, tolerated

# How many items are looked at for a short one and a long one.
_ITEMS = 16
# The size of the batches: one that few other axes have.
_ROWS = 7


def problem_of_padding(loader: object, model: nn.Module, *, batch_first: bool) -> Problem | None:
    """Return the problem if an item's outputs depend on the length of another item.

    It counts only if they do so in each way of calling the model that tells: the loop may pass a
    mask, or may not. Nothing is found where the collate function is random or fails.

    Args:
        loader: the data loader.
        model: the model.
        batch_first: whether the batch axis is the first one, or the second.
    """
    # Torch's own collate function does not pad.
    if not isinstance(loader, DataLoader) or loader.collate_fn is default_collate:
        return None
    collated = _collated(loader, doubled=device_of(model).type == "cpu")
    if collated is None:
        return None
    found = False
    axis = 0 if batch_first else 1
    ways = zip(*(calls(own, model) for own in collated), strict=False)
    for (args, kwargs), (other_args, other_kwargs) in ways:
        alone = Batch(args, kwargs, _ROWS, axis)
        depends = _depends(model, alone, Batch(other_args, other_kwargs, _ROWS, axis))
        if depends is False:
            return None
        found = found or depends is True
    return Problem("(root)", problems.PADDED) if found else None


def _collated(loader: DataLoader[Any], *, doubled: bool) -> tuple[Any, Any] | None:
    """Return a batch of one short item, and the same with a long one in the place of the last.

    Args:
        loader: the data loader.
        doubled: whether a long item may be made up. On a GPU, one that is too long for a table of
            positions would make the device unusable for the process.
    """
    try:
        with repeatable(torch.device("cpu")):
            items = [loader.dataset[index] for index in range(min(_ITEMS, len(loader.dataset)))]  # type: ignore[arg-type]
            sizes = [sum(x.numel() for x in _tensors(loader.collate_fn([own]))) for own in items]
            short, long = (items[sizes.index(size)] for size in (min(sizes), max(sizes)))
            if min(sizes) == max(sizes):
                if not doubled:
                    return None
                # Only a collate function that pads takes an item of another length.
                long = _doubled(short)
            batches = [[short] * _ROWS, [short] * (_ROWS - 1) + [long]]
            once, again = ([loader.collate_fn(own) for own in batches] for _ in range(2))
            # Masks that are drawn in the collate function differ with or without another item.
            return (once[0], once[1]) if equal(_tensors(once), _tensors(again)) else None
    except Exception:  # whatever the user's own code raises
        return None


def _doubled(value: Any) -> Any:
    """Return an item in which each sequence of two numbers or more comes twice."""
    if isinstance(value, Tensor):
        return torch.cat([value, value]) if value.dim() and len(value) > 1 else value
    if isinstance(value, np.ndarray):
        return np.concatenate([value, value]) if value.ndim and len(value) > 1 else value
    if isinstance(value, Mapping):
        return {key: _doubled(own) for key, own in value.items()}
    if not isinstance(value, (list, tuple)) or hasattr(value, "_fields"):
        return value
    if isinstance(value, list) and len(value) > 1 and all(isinstance(x, Number) for x in value):
        return value + value
    return type(value)(map(_doubled, value))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in batch_leaves(value) if isinstance(leaf, Tensor)]


def _depends(model: nn.Module, alone: Batch, beside: Batch) -> bool | None:
    """Return whether outputs differ between the two batches; ``None`` if nothing can be said."""
    for double in (True, False):
        if double and not Copy.fits(model):
            continue
        try:
            steady = Steady()
            with Copy(model, double=double) as copy:
                ours = copy.run(alone, steady, inside=False).outputs
                theirs = copy.run(beside, steady, inside=False).outputs
                tolerance = tolerated(steady, copy.device)
            pairs = zip(ours, theirs, strict=False)
            found = {_differ(one, other, tolerance) for one, other in pairs}
        except Exception:  # whatever the model's own code raises
            continue
        return next((answer for answer in (True, False) if answer in found), None)
    return None


def _differ(one: Tensor, other: Tensor, tolerance: float) -> bool | None:
    """Return whether too few rows of the second output are as those of the first.

    The collate function may have sorted the items. Any axis of the right size may be the batch's.
    The answer is ``None`` for an output without such an axis, or with two axes of positions.
    """
    if one.dim() != other.dim():
        return None
    sizes = list(zip(one.shape, other.shape, strict=True))
    longer = [axis for axis, (short, long) in enumerate(sizes) if short != long]
    rows = [axis for axis, both in enumerate(sizes) if both == (_ROWS, _ROWS)]
    if not rows or len(longer) > 1 or any(short > long for short, long in sizes):
        return None
    parts = [other]
    for axis in longer:  # the positions of the short item are the first or the last ones
        short, long = sizes[axis]
        parts = [other.narrow(axis, start, short) for start in (0, long - short)]
    return not any(_are_alike(one, part, axis, tolerance) for axis in rows for part in parts)


def _are_alike(one: Tensor, other: Tensor, axis: int, tolerance: float) -> bool:
    """Return whether all rows but one of the second output are as those of the first."""
    row = one.select(axis, 0)
    alike = [equal([row], [own], tolerance) for own in other.unbind(axis)]
    return sum(alike) >= _ROWS - 1
