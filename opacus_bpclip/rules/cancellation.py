"""Suppress what is only rounding error after a difference or a sum has cancelled.

Where numbers cancel, rounding errors of some units in the last place of these numbers remain. With
a mean loss these errors change with the batch's private size, and they do so in the same way in all
equal examples. A normalisation of nearly constant inputs multiplies them by some hundred, and the
next one does so again, until they reach the clipping limit. See ``docs/rules/normalization.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Both in units in the last place of the numbers that cancel. A remainder up to the first is treated
# as rounding error, and one from the second on is left unchanged.
ROUNDING = 64
ORDINARY = 2**13


def cancellation_factor(
    remainder: Tensor, cancelled: Tensor, dtype: torch.dtype, limit: Tensor | float | None = None
) -> Tensor:
    """Return the factor to multiply the remainder of a cancellation by.

    0 up to `ROUNDING` units in the last place, 1 from `ORDINARY` on, linear in between. It is
    continuous: a change of ``remainder / cancelled`` by ``d`` changes it by at most
    ``d / ((ORDINARY - ROUNDING) eps)``.

    Args:
        remainder: the norm of what remains.
        cancelled: a bound on the norm of what has cancelled, of the same shape.
        dtype: the dtype of the numbers that have cancelled.
        limit: a norm up to which the remainder is not scaled up afterwards. A smaller remainder
            counts as this large: rounding errors of numbers less than `ORDINARY` times larger than
            the limit are small beside it already.
    """
    remainder = remainder if limit is None else remainder.clamp(min=limit)
    ulps = remainder / (cancelled * torch.finfo(dtype).eps)
    # 0 / 0 is nan: nothing has cancelled. Examples that overflow are found elsewhere.
    return ((ulps - ROUNDING) / (ORDINARY - ROUNDING)).nan_to_num(nan=1.0).clamp(0, 1)
