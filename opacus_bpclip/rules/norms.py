"""Per-example bounds on the norm of a layer's weight gradient: pure mathematics, no modules.

Shapes, throughout: an upstream gradient ``g`` is ``[B, R, C, P]`` and the columns ``u`` that meet
it are ``[B, R, D, P]``, for ``B`` examples, ``R`` groups of channels, ``C`` output channels and
``D`` inputs per group, ``P`` positions. The example's gradient is ``dW[r] = g[r] @ u[r].T`` and,
where the layer has a bias, ``db[r] = g[r].sum(-1)``: the bias is one more column entry, a 1.

Every function here returns an upper bound on the norm of what floating-point arithmetic really
sums, not only of the real numbers: ``rounding_margin`` covers relative errors, ``underflow`` the
squares and products that vanish. Proofs: ``docs/guarantee.md``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opacus_bpclip.rules.precision import norm_dtype


def accumulation(positions: int, dtype: torch.dtype) -> float:
    """Return by what factor a sum of ``positions`` products may exceed what it should be.

    Added up one by one, each rounds the sum by half a unit of the last place. The bound's own sums
    may fall as much too short.
    """
    return 1 + positions * torch.finfo(norm_dtype(dtype)).eps


def column_norms(input_norms: Tensor, *, weight: bool, bias: bool) -> Tensor:
    """Return the norm of each column of trainable inputs, the bias's constant 1 included.

    Args:
        input_norms: ``[B, R, P]``, the norm of each input column.
        weight: whether the weight is trainable.
        bias: whether the bias is.
    """
    if not weight:
        return torch.ones_like(input_norms)
    if bias:
        return torch.sqrt(input_norms.square() + 1)
    return input_norms + smallest_column(input_norms.dtype)


def smallest_column(dtype: torch.dtype) -> float:
    """Return the norm that a vanishing column is taken to have: 3e-10 in float32, 1e-77 in float64.

    So no gradient is scaled up by more than its reciprocal. A factor near the largest number would
    overflow in the layers below, and their zero times infinity would be everybody's nan.
    """
    return float(torch.finfo(dtype).tiny ** 0.25)


def smallest_column_norm(dtype: torch.dtype, *, weight: bool, bias: bool) -> float:
    """Return what no norm of `column_norms` is below."""
    return 1.0 if bias or not weight else smallest_column(dtype)


def max_column_norm(max_norm: float, *, weight: bool, bias: bool) -> float:
    """Return the largest norm that a column can have, the bias's constant 1 included.

    ``sqrt(max_norm ** 2 + 1)`` for a layer with weight and bias, whatever its number of positions.
    """
    return math.sqrt(max_norm**2 * weight + bias)


def row_norms(g: Tensor) -> Tensor:
    """Return the norm of each row of ``g``, ``[B, ...]``, never below the true one. ``[B]``.

    The whole bound where ``g`` is the examples' gradient itself.
    """
    dtype = norm_dtype(g.dtype)
    # Not flattened: a compiler may have the channels last, and would read them one by one.
    g = g.unsqueeze(-1)
    axes = tuple(range(1, g.dim()))
    count = g.shape[1:].numel()
    return torch.linalg.vector_norm(g, dim=axes, dtype=dtype) + underflow(count, dtype)


def product_bound(g: Tensor, max_column_norm: float, room: Tensor | None = None) -> Tensor:
    """Return ``max_column_norm * N(g)``: L1 over positions, then L2 over channels. ``[B]``.

    Source: design section 3; for each channel, ``norm(sum_p g_p u_p) <= max norm(u) sum |g_p|``.

    Args:
        g: ``[B, R, C, P]``.
        max_column_norm: the largest norm of a column.
        room: as ``g``, overwritten; saves fresh memory.
    """
    dtype = norm_dtype(g.dtype)
    slack = underflow(g.shape[1] * g.shape[2], dtype)
    if g.shape[-1] == 1:
        return (torch.linalg.vector_norm(g, dim=(1, 2, 3), dtype=dtype) + slack) * max_column_norm
    # Not a vector_norm of order 1, whose kernel is many times slower.
    summed = torch.abs(g, out=room).sum(dim=-1, dtype=dtype)
    return (torch.linalg.vector_norm(summed, dim=(1, 2)) + slack) * max_column_norm


def weighted_bound(g: Tensor, norms: Tensor, room: Tensor | None = None) -> Tensor:
    """Return the L2 norm over channels of ``sum_p |g[c, p]| norm(u_p)``. ``[B]``.

    Args:
        g: ``[B, R, C, P]``.
        norms: ``[B, R, P]``, from `column_norms`.
        room: as ``g``, overwritten; saves fresh memory.
    """
    dtype = norm_dtype(g.dtype)
    channels = g.shape[1] * g.shape[2]
    slack = underflow(channels, dtype)
    if g.shape[-1] == 1:
        # One position: each group's bound is norm(g) norm(u), and with one group nothing is lost.
        per_group = torch.linalg.vector_norm(g, dim=(2, 3), dtype=dtype) + slack
        return torch.linalg.vector_norm(per_group * norms[..., 0], dim=1) + slack
    magnitudes = torch.abs(g, out=room).to(dtype)
    # The vector first: the other way round the batched product is many times slower.
    summed = torch.matmul(norms.to(dtype).unsqueeze(-2), magnitudes.transpose(-1, -2))
    return torch.linalg.vector_norm(summed, dim=(1, 2, 3)) + slack


def underflow(count: int, dtype: torch.dtype) -> float:
    """Return what a norm of ``count`` numbers may lose to squares and products that vanish.

    Each of them may lose the smallest normal number of ``dtype``.
    """
    return 2 * math.sqrt(count * torch.finfo(dtype).tiny)
