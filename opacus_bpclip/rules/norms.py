"""Bounds on the norm of each example's weight gradient, as functions of tensors alone.

Shapes: the upstream gradient ``g`` is ``[B, R, C, P]`` and the columns ``u`` are ``[B, R, D, P]``,
for ``B`` examples, ``R`` groups of channels, ``C`` output channels and ``D`` inputs per group, and
``P`` positions. The example's gradient is ``dW[r] = g[r] @ u[r].T`` and, where the layer has a
bias, ``db[r] = g[r].sum(-1)``: a bias appends the constant 1 to every column.

Guarantee: the bounds hold for the gradient that floating-point arithmetic computes, not only for
real numbers. `rounding_margin` covers relative errors, `underflow` the squares and products that
underflow. Proofs: ``docs/guarantee.md``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opacus_bpclip.rules.precision import norm_dtype


def accumulation(positions: int, dtype: torch.dtype) -> float:
    """Return a factor that covers the rounding errors of sums over ``positions`` products.

    Each addition may round by half a unit in the last place. So the computed gradient may be too
    large, and the bound, which is such a sum itself, too small by as much.
    """
    return 1 + positions * torch.finfo(norm_dtype(dtype)).eps


def column_norms(input_norms: Tensor, *, weight: bool, bias: bool) -> Tensor:
    """Return the norm of each column, ``[B, R, P]``, counting the trainable parameters only.

    A trainable bias appends the constant 1; without a trainable weight the input does not count.

    Args:
        input_norms: ``[B, R, P]``, the norm of each input column.
        weight: whether the weight is trainable.
        bias: whether the bias is trainable.
    """
    if not weight:
        return torch.ones_like(input_norms)
    if bias:
        return torch.sqrt(input_norms.square() + 1)
    return input_norms + smallest_column(input_norms.dtype)


def smallest_column(dtype: torch.dtype) -> float:
    """Return the smallest norm that a column counts with: 3e-10 in float32, 1e-77 in float64.

    It limits how far a gradient can be scaled up. A factor near the largest number would overflow
    in the layers below, where zero times infinity gives nan in the sum over all examples.
    """
    return float(torch.finfo(dtype).tiny ** 0.25)


def smallest_column_norm(dtype: torch.dtype, *, weight: bool, bias: bool) -> float:
    """Return a lower bound on the norms from `column_norms`."""
    return 1.0 if bias or not weight else smallest_column(dtype)


def max_column_norm(max_norm: float, *, weight: bool, bias: bool) -> float:
    """Return the largest norm of a column that was clipped to ``max_norm``.

    ``sqrt(max_norm ** 2 + 1)`` for a layer with weight and bias, whatever its number of positions:
    the bias appends one constant 1 to each column.
    """
    return math.sqrt(max_norm**2 * weight + bias)


def row_norms(g: Tensor) -> Tensor:
    """Return an upper bound on the norm of each row of ``g``, ``[B, ...]``, tight to rounding.

    If ``g`` holds the per-example gradients, this is the exact bound. ``[B]``.
    """
    dtype = norm_dtype(g.dtype)
    # Not flattened: in a compiled graph the channels may be last in memory, and flattening would
    # make it read them one by one.
    g = g.unsqueeze(-1)
    axes = tuple(range(1, g.dim()))
    count = g.shape[1:].numel()
    return torch.linalg.vector_norm(g, dim=axes, dtype=dtype) + underflow(count, dtype)


def product_bound(g: Tensor, max_column_norm: float, scratch: Tensor | None = None) -> Tensor:
    """Return ``max_column_norm * N(g)``: L1 over positions, then L2 over channels. ``[B]``.

    For each channel, ``norm(sum_p g_p u_p) <= max_p norm(u_p) * sum_p |g_p|``. Source: the bound of
    arXiv 2202.05089, tightened. Proof: ``docs/guarantee.md``.

    Args:
        g: ``[B, R, C, P]``.
        max_column_norm: the largest norm of a column.
        scratch: memory of ``g``'s shape, overwritten; ``None`` allocates.
    """
    dtype = norm_dtype(g.dtype)
    slack = underflow(g.shape[1] * g.shape[2], dtype)
    if g.shape[-1] == 1:
        return (torch.linalg.vector_norm(g, dim=(1, 2, 3), dtype=dtype) + slack) * max_column_norm
    # A vector_norm of order 1 would be many times slower.
    summed = torch.abs(g, out=scratch).sum(dim=-1, dtype=dtype)
    return (torch.linalg.vector_norm(summed, dim=(1, 2)) + slack) * max_column_norm


def weighted_bound(g: Tensor, norms: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Return the L2 norm over channels of ``sum_p |g[c, p]| norm(u_p)``. ``[B]``.

    Proof: ``docs/guarantee.md``.

    Args:
        g: ``[B, R, C, P]``.
        norms: ``[B, R, P]``, from `column_norms`.
        scratch: memory of ``g``'s shape, overwritten; ``None`` allocates.
    """
    dtype = norm_dtype(g.dtype)
    channels = g.shape[1] * g.shape[2]
    slack = underflow(channels, dtype)
    if g.shape[-1] == 1:
        # For one position a group's bound is norm(g) norm(u), which is the norm of its gradient.
        per_group = torch.linalg.vector_norm(g, dim=(2, 3), dtype=dtype) + slack
        return torch.linalg.vector_norm(per_group * norms[..., 0], dim=1) + slack
    magnitudes = torch.abs(g, out=scratch).to(dtype)
    # With the vector on the right, the batched product would be many times slower.
    summed = torch.matmul(norms.to(dtype).unsqueeze(-2), magnitudes.transpose(-1, -2))
    return torch.linalg.vector_norm(summed, dim=(1, 2, 3)) + slack


def underflow(count: int, dtype: torch.dtype) -> float:
    """Return how much too small a norm of ``count`` numbers may be because of underflow.

    Each of its squares and products may lose the smallest normal number of ``dtype``.
    """
    return 2 * math.sqrt(count * torch.finfo(dtype).tiny)
