"""Search for examples whose outputs depend on how far the others of a batch make them padded.

The other searches run batches of one shape. Where a collate function pads its items to the longest
of the batch, one long example changes the inputs of all others. If the model does not leave padding
out (a mean over all positions, the last output of a recurrent network), it changes what they
contribute, and no noise covers that.

So a short item of the data set is collated by itself, and beside a long one. What the model makes
of it must be the same. Where the first items have one length, the long one is one of them twice.
This uses values of the data set, as training does, and only to see whether
they differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from opacus_bpclip.probe import problems
from opacus_bpclip.probe.batches import EXAMPLES, Batch
from opacus_bpclip.probe.comparison import equal
from opacus_bpclip.probe.copies import Copy
from opacus_bpclip.probe.forms import calls
from opacus_bpclip.probe.leaves import batch_leaves, map_leaves
from opacus_bpclip.probe.problems import Problem
from opacus_bpclip.probe.randomness import Steady, repeatable, tolerated

# How many items are looked at for a short one and a long one.
_ITEMS = 16


def problem_of_padding(
    loader: object, model: nn.Module, form: int, *, batch_first: bool
) -> Problem | None:
    """Return the problem if an item's outputs depend on the length of another item.

    Nothing is found where the collate function is random or fails, or the model does not run on
    these items.

    Args:
        loader: the data loader.
        model: the model.
        form: the number of the way of calling the model, as `calls` yields them.
        batch_first: whether the batch axis is the first one, or the second.
    """
    # Torch's own collate function does not pad.
    if not isinstance(loader, DataLoader) or loader.collate_fn is default_collate:
        return None
    collated = _collated(loader)
    if collated is None:
        return None
    axis = 0 if batch_first else 1
    for double in (True, False):
        if double and not Copy.fits(model):
            continue
        try:
            alone, beside = (
                Batch(*list(calls(own, model))[form], EXAMPLES, axis) for own in collated
            )
            steady = Steady()
            with Copy(model, double=double) as copy:
                ours = copy.run(alone, steady, inside=False).outputs
                theirs = copy.run(beside, steady, inside=False).outputs
                tolerance = tolerated(steady, copy.device)
        except Exception:  # whatever the model's own code raises
            continue
        pairs = zip(ours, theirs, strict=False)
        if any(_depends(one, other, axis, tolerance) for one, other in pairs):
            return Problem("(root)", problems.PADDED)
        return None
    return None


def _collated(loader: DataLoader[Any]) -> tuple[Any, Any] | None:
    """Return a batch of one short item, and the same with a long one in the place of the last."""
    try:
        with repeatable(torch.device("cpu")):
            items = [loader.dataset[index] for index in range(min(_ITEMS, len(loader.dataset)))]  # type: ignore[arg-type]
            sizes = [sum(x.numel() for x in _tensors(loader.collate_fn([own]))) for own in items]
            short, long = (items[sizes.index(size)] for size in (min(sizes), max(sizes)))
            if min(sizes) == max(sizes):
                # Only a collate function that pads takes an item of another length.
                long = map_leaves(short, _doubled)
            batches = [[short] * EXAMPLES, [short] * (EXAMPLES - 1) + [long]]
            once, again = ([loader.collate_fn(own) for own in batches] for _ in range(2))
    except Exception:  # whatever the user's own code raises
        return None
    # Masks that are drawn in the collate function differ with or without another item.
    return (once[0], once[1]) if equal(_tensors(once), _tensors(again)) else None


def _doubled(leaf: Any) -> Any:
    return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() else leaf


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in batch_leaves(value) if isinstance(leaf, Tensor)]


def _depends(one: Tensor, other: Tensor, axis: int, tolerance: float) -> bool:
    """Return whether too few rows of the second batch are as those of the first.

    The collate function may have sorted the items.
    """
    places = [
        place
        for place in dict.fromkeys((axis, 0))
        if one.dim() == other.dim() > place and one.shape[place] == other.shape[place] == EXAMPLES
    ]
    if not places:
        return False
    row = one.select(places[0], 0)
    alike = [_is_in(row, own, tolerance) for own in other.unbind(places[0])]
    return sum(alike) < EXAMPLES - 1


def _is_in(short: Tensor, long: Tensor, tolerance: float) -> bool:
    """Return whether an output is the beginning or the end of a longer one, or equal to it."""
    longer = [axis for axis in range(short.dim()) if short.shape[axis] != long.shape[axis]]
    if not longer:
        return equal([short], [long], tolerance)
    if len(longer) > 1 or short.shape[longer[0]] > long.shape[longer[0]]:
        return True  # It is unknown what belongs together.
    parts: Sequence[Tensor] = [
        long.narrow(longer[0], start, short.shape[longer[0]])
        for start in (0, long.shape[longer[0]] - short.shape[longer[0]])
    ]
    return any(equal([short], [part], tolerance) for part in parts)
