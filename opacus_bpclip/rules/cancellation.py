"""What a difference or a sum leaves may be nothing but rounding: it is not let grow.

Where numbers cancel, rounding errors stay, some units of the last place of what has cancelled. With
a mean loss they change with the batch's private size, alike in all examples that are equal. Small
as they are, a normalisation of constants multiplies them by some hundred, the next one again, until
they reach the limit that examples are clipped to. See ``docs/rules/normalization.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor

# In units of the last place: what is left of a cancellation is rounding up to here,
ROUNDING = 64
# and is kept as it is from here on.
ORDINARY = 2**13


def kept(
    left: Tensor, of: Tensor, dtype: torch.dtype, limit: Tensor | float | None = None
) -> Tensor:
    """Return by what to multiply what is left of a cancellation.

    0 up to `ROUNDING` units of the last place, 1 from `ORDINARY` on, and a line between them, so
    that it is continuous: a change of ``left / of`` by ``d`` changes it by at most
    ``d / ((ORDINARY - ROUNDING) eps)``.

    Args:
        left: the norm of what is left.
        of: a bound on the norm of what has cancelled, of the same shape.
        dtype: of the numbers that have cancelled.
        limit: what is left is not scaled up after this, and clipped to it: next to it, rounding of
            something that is not `ORDINARY` times larger is small already.
    """
    left = left if limit is None else left.clamp(min=limit)
    ulps = left / (of * torch.finfo(dtype).eps)
    # Of nothing nothing is left; and what overflows is not for here to judge.
    return ((ulps - ROUNDING) / (ORDINARY - ROUNDING)).nan_to_num(nan=1.0).clamp(0, 1)
