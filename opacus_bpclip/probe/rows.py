"""Whether a criterion computes each row of losses from the same row of its arguments only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opacus_bpclip.probe.batches import Batch
from opacus_bpclip.probe.comparison import distance, partitions
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
    batch = Batch(args, kwargs, size, 0)
    if size < 2:
        return False
    try:
        # With gradients, since some criteria keep something for the next batch only then.
        with torch.enable_grad(), repeatable(torch.device("cpu")):
            whole = criterion(*args, **kwargs).detach()
            for rows in next(partitions(size)):
                half = batch.select(rows)
                own = criterion(*half.args, **half.kwargs).detach()
                gap = distance(whole[rows].flatten(), own.flatten())
                if float(gap.max()) > _UNITS * torch.finfo(whole.dtype).eps:
                    return True
    except Exception:  # whatever the criterion's own code raises on half of a batch
        return False
    return False
