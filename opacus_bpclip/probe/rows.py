"""Whether a criterion computes each row of losses from the same row of its arguments only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from opacus_bpclip.probe.batches import Batch
from opacus_bpclip.probe.comparison import distance, partitions
from opacus_bpclip.probe.leaves import batch_leaves
from opacus_bpclip.probe.randomness import repeatable

# In units of the losses' precision, as for a model's outputs.
_UNITS = 2.0**10


def rows_are_coupled(
    criterion: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], size: int
) -> bool:
    """Return whether a row of losses changes when half of the other rows are left out.

    Args:
        criterion: returns ``[B, ...]``, one row for each example.
        args: the positional arguments of its call.
        kwargs: the keyword arguments of its call.
        size: ``B``; for one row the result is ``False``.
    """
    if size < 2:
        return False
    found = []
    # A list of as many items as examples may hold one for each of them, or other things.
    for lists in (True, False):
        try:
            found.append(_halves_differ(criterion, args, kwargs, size, lists=lists))
        except Exception:  # whatever the criterion's own code raises on half of a batch
            continue
    return bool(found) and all(found)


def _halves_differ(
    criterion: Callable[..., Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    size: int,
    *,
    lists: bool,
) -> bool:
    # With gradients, since some criteria keep something for the next batch only then.
    with torch.enable_grad(), repeatable(torch.device("cpu")):
        whole = criterion(*args, **kwargs).detach()
        for rows in next(partitions(size)):
            half = (
                _selected(args, kwargs, rows, size)
                if lists
                else Batch(args, kwargs, size, 0).select(rows)
            )
            own = criterion(*half.args, **half.kwargs).detach()
            gap = distance(whole[rows].flatten(), own.flatten())
            if float(gap.max()) > _UNITS * torch.finfo(whole.dtype).eps:
                return True
    return False


def _selected(
    args: tuple[Any, ...], kwargs: dict[str, Any], rows: Sequence[int], size: int
) -> Batch:
    """Return the arguments with these examples only; lists may have an item for each example.

    A list of as many tensors that all have a row for each example is not such a list.
    """
    items: list[Tensor] = []

    def visit(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: visit(own) for key, own in value.items()}
        if type(value) not in (list, tuple):
            return value
        batched = all(isinstance(own, Tensor) and own.shape[:1] == (size,) for own in value)
        if len(value) != size or batched:
            return type(value)(map(visit, value))
        chosen = [value[row] for row in rows]
        items.extend(leaf for leaf in batch_leaves(chosen) if isinstance(leaf, Tensor))
        return type(value)(chosen)

    shorter = tuple(map(visit, args)), {key: visit(own) for key, own in kwargs.items()}
    return Batch(*shorter, size, 0, shared=tuple(items)).select(rows)
