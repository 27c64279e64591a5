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
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# An upper limit for the temporary columns or gradients of an exact bound, in bytes. A processor
# works in its cache, and gets small blocks of memory without asking the system. A traced graph has
# the operations of each chunk in it; an accelerator would rather do much at once.
EXACT_MEMORY_CAP = 2 * 2**20
_TRACED_EXACT_MEMORY_CAP = 16 * 2**20
_ACCELERATOR_EXACT_MEMORY_CAP = 64 * 2**20

# An example's own gradient takes the flops that the sum over the batch would take anyway, but it is
# written once and read twice. That costs about as much as this many flops for each of its numbers:
# benchmarks/exact_norm.py.
_FLOPS_OF_PASSES = 42

# How many units of the last place the sums and products of one bound may lose together.
_ULPS = 64


def accumulation(positions: int, dtype: torch.dtype) -> float:
    """Return by what factor a sum of ``positions`` products may exceed what it should be.

    Added up one by one, each rounds the sum by half a unit of the last place. The bound's own sums
    may fall as much too short.
    """
    return 1 + positions * torch.finfo(norm_dtype(dtype)).eps


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which norms are computed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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


def exact_bound(
    g: Tensor, u: Tensor, norms: Tensor, *, weight: bool, bias: bool, slack: float
) -> Tensor:
    """Return the norm of each example's gradient, plus what rounding may add to it. ``[B]``.

    Positions may cancel in the gradient but not in its rounding errors. These are at most
    ``slack * norm(g) * norm(u)`` (Frobenius norms), so that much is added.

    Args:
        g: ``[B, R, C, P]``.
        u: ``[B, R, D, P]``, the input columns without the bias's entry.
        norms: ``[B, R, P]``, the columns' norms with it.
        weight: whether the weight is trainable.
        bias: whether the bias is.
        slack: from `rounding_margin`.
    """
    dtype = norm_dtype(g.dtype)
    g, u = g.to(dtype), u.to(dtype)
    channels, positions = g.shape[2:]
    inputs = u.shape[2]
    if positions == 1:
        g_norm = torch.linalg.vector_norm(g, dim=(2, 3)) + underflow(channels, dtype)
        return _joined(g_norm * norms[..., 0], g, inputs)
    if not gram_is_cheaper(positions, channels, inputs):
        own = _direct_norm(g, u, weight=weight, bias=bias)
        return own_bound(own, g, norms, inputs=inputs, slack=slack)
    squared, g_norm = _gram_square(g, u, weight=weight, bias=bias)
    error = slack * _frobenius_product(g_norm, g, norms, inputs, slack).square()
    # The root turns an error of the square into a larger one: the slack goes under it.
    return _joined(torch.sqrt(squared.clamp(min=0) + error), g, inputs)


def own_bound(own: Tensor, g: Tensor, norms: Tensor, *, inputs: int, slack: float) -> Tensor:
    """Return `exact_bound` from the norm of the gradient itself. ``[B]``.

    Args:
        own: ``[B, R]``, the norm of each group's gradient, as arithmetic has made it.
        g: as for `exact_bound`.
        norms: as for `exact_bound`.
        inputs: ``D``.
        slack: as for `exact_bound`.
    """
    g_norm = torch.linalg.vector_norm(g, dim=(2, 3), dtype=norm_dtype(g.dtype))
    return _joined(own + slack * _frobenius_product(g_norm, g, norms, inputs, slack), g, inputs)


def _frobenius_product(
    g_norm: Tensor, g: Tensor, norms: Tensor, inputs: int, slack: float
) -> Tensor:
    """Return the product of the norms of ``g`` and of the columns, for each group. ``[B, R]``.

    What vanishes on one side may be multiplied by the other: it counts in the norms, and by so much
    that the slack covers it.
    """
    channels, positions = g.shape[2:]
    g_slack = underflow(positions * channels, norms.dtype) / math.sqrt(slack)
    u_slack = underflow(positions * inputs, norms.dtype) / math.sqrt(slack)
    return (g_norm + g_slack) * (torch.linalg.vector_norm(norms, dim=2) + u_slack)


def _joined(per_group: Tensor, g: Tensor, inputs: int) -> Tensor:
    """Return the norm over groups, with what may have vanished on the way. ``[B]``."""
    groups, channels, positions = g.shape[1:]
    count = groups * positions * (positions + channels + inputs)
    return torch.linalg.vector_norm(per_group, dim=1) + underflow(count, per_group.dtype)


def gram_is_cheaper(positions: int, channels: int, inputs: int) -> bool:
    """Return whether two ``P x P`` Gram matrices cost less than the ``C x D`` gradient.

    For a gradient that is made to be measured and thrown away.
    """
    return positions * positions * (channels + inputs) < positions * channels * inputs


def own_is_cheaper(positions: int, channels: int, inputs: int) -> bool:
    """Return whether two ``P x P`` Gram matrices cost more than to keep the ``C x D`` gradient.

    For a gradient that is made, measured, scaled and added to the sum over the batch.
    """
    flops_of_gram = 2 * positions * positions * (channels + inputs)
    return flops_of_gram >= _FLOPS_OF_PASSES * channels * inputs


def exact_chunk(per_example: int, device: torch.device) -> int:
    """Return how many examples at a time stay under the cap for temporary memory, at least 1.

    Args:
        per_example: bytes that each of them takes, see `exact_bytes`.
        device: where.
    """
    cap = EXACT_MEMORY_CAP
    if device.type != "cpu":
        cap = _ACCELERATOR_EXACT_MEMORY_CAP
    elif torch.compiler.is_compiling():
        cap = _TRACED_EXACT_MEMORY_CAP
    return max(1, cap // max(1, per_example))


def exact_bytes(positions: int, groups: int, channels: int, inputs: int, dtype: torch.dtype) -> int:
    """Return the bytes of temporary memory that `exact_bound` takes for an example."""
    gradient = channels * (inputs + 1)
    columns = positions * (inputs + channels)
    gram = 2 * positions * positions
    return groups * (columns + min(gradient, gram)) * norm_dtype(dtype).itemsize


def chunks(batch: int, size: int) -> Iterator[slice]:
    """Yield ``batch`` examples, ``size`` at a time; an empty slice if there are none."""
    for start in range(0, max(batch, 1), size):
        yield slice(start, start + size)


def in_chunks(batch: int, chunk: int, bound: Callable[[slice], Tensor]) -> Tensor:
    """Return one number for each example, made for ``chunk`` of them at a time. ``[B]``.

    Args:
        batch: how many examples there are.
        chunk: from `exact_chunk`.
        bound: called with which examples; returns their numbers.

    Example:
        >>> in_chunks(5, 2, lambda rows: torch.arange(5)[rows])
        tensor([0, 1, 2, 3, 4])
    """
    parts = [bound(rows) for rows in chunks(batch, chunk)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _direct_norm(g: Tensor, u: Tensor, *, weight: bool, bias: bool) -> Tensor:
    """Return the norm of each group's gradient, which is made. ``[B, R]``."""
    norm = torch.zeros(g.shape[:2], dtype=g.dtype, device=g.device)
    if weight:
        gradient = torch.matmul(g, u.transpose(-1, -2))
        norm = torch.linalg.vector_norm(gradient, dim=(2, 3))
    if bias:
        norm = torch.hypot(norm, torch.linalg.vector_norm(g.sum(-1), dim=2))
    return norm


def _gram_square(g: Tensor, u: Tensor, *, weight: bool, bias: bool) -> tuple[Tensor, Tensor]:
    """Return the squared norm of each group's gradient, never made, and ``g``'s norm. ``[B, R]``.

    ``norm(g u^T)^2 = sum_pq (g_p . g_q)(u_p . u_q)``.
    """
    gram = torch.matmul(g.transpose(-1, -2), g)
    g_norm = gram.diagonal(dim1=2, dim2=3).sum(dim=2).sqrt()
    columns = torch.zeros_like(gram)
    if weight:
        columns = torch.matmul(u.transpose(-1, -2), u)
    if bias:
        columns = columns + 1
    return (gram * columns).sum(dim=(2, 3)), g_norm


def underflow(count: int, dtype: torch.dtype) -> float:
    """Return what a norm of ``count`` numbers may lose to squares and products that vanish.

    Each of them may lose the smallest normal number of ``dtype``.
    """
    return 2 * math.sqrt(count * torch.finfo(dtype).tiny)
