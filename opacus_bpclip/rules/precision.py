"""Which dtypes are accepted, and what is computed in which: all of it in one place.

A model may compute in `torch.bfloat16`, by autocast or by its parameters: its outputs and what
flows back through it are then rounded to eight bits. What this package makes of them is not. Norms,
factors, the sums over a batch and the noise are in the `wide` dtype: float64 for float64, else
float32. A sum over a batch that is rounded to bfloat16 may move by more than one example's
contribution (301 becomes 300 or 302). Proof: ``docs/guarantee.md``, "Low precision".
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import overload

import torch
from torch import Tensor

# Half precision (float16) is left out: it trains with a GradScaler only, whose scale depends on the
# data.
ACCEPTED = (torch.float32, torch.float64, torch.bfloat16)

# How many units of the last place the sums and products of one bound may lose together.
_ULPS = 64


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of norms, factors and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_low(dtype: torch.dtype) -> bool:
    """Return whether numbers of this dtype have fewer bits than float32's.

    Example:
        >>> is_low(torch.bfloat16), is_low(torch.float32), is_low(torch.int64)
        (True, False, False)
    """
    return dtype.is_floating_point and dtype.itemsize < 4


@overload
def wide(x: Tensor) -> Tensor: ...
@overload
def wide(x: None) -> None: ...


def wide(x: Tensor | None) -> Tensor | None:
    """Return a tensor in the dtype of norms and sums; the tensor itself if it has that.

    Products of two numbers of bfloat16 are exact in float32. So what is made of widened tensors is
    as right as if the model had computed these very numbers in float32. Integers stay as they are.
    """
    if x is None or not is_low(x.dtype):
        return x
    return x.to(norm_dtype(x.dtype))


def is_autocast() -> bool:
    """Return whether autocast is on, on any kind of device."""
    return bool(torch._C._is_any_autocast_enabled())


def full_precision() -> AbstractContextManager[object]:
    """Run without autocast, which would compute norms and sums in low precision."""
    if is_autocast():
        off: AbstractContextManager[object] = torch._C._DisableAutocast()
        return off
    return nullcontext()


def rounding_margin(dtype: torch.dtype, device: torch.device) -> float:
    """Return the relative error that rounding may add to a gradient of this dtype.

    Covers the norm's own arithmetic, the rounding of the scaled gradient to ``dtype``, and
    TensorFloat-32 products where the device may use them.
    """
    margin = _ULPS * torch.finfo(norm_dtype(dtype)).eps
    if dtype not in (torch.float64, torch.float32):
        margin += torch.finfo(dtype).eps
    elif dtype == torch.float32 and device.type == "cuda":
        margin += 2.0**-9
    return margin
