"""Transforms of one picture ``[C, H, W]`` at random, for ``--transform``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Transform = Callable[[Tensor], Tensor]


def shifts() -> Transform:
    """Return a shift in both directions by at most an eighth of the height, reflected at the edge.

    For pictures of 32 by 32 pixels these are the customary 4 pixels.
    """
    return _shifted


def shifts_and_flips() -> Transform:
    """Return the same, and every other picture mirrored."""
    return _shifted_and_flipped


def _shifted(x: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    most = max(1, height // 8)
    down, right = torch.randint(2 * most + 1, (2,)).tolist()
    padded = F.pad(x, (most,) * 4, mode="reflect")
    return padded[..., down : down + height, right : right + width]


def _shifted_and_flipped(x: Tensor) -> Tensor:
    x = _shifted(x)
    return x.flip(-1) if torch.rand(()) < 0.5 else x
