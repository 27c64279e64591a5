"""The exact bound: the norm of each example's weight gradient itself, by the cheapest way to it.

Shapes and promises are those of ``norms.py``. Source: design section 3; proofs in
``docs/guarantee.md``, costs in ``docs/cost-model.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from opacus_bpclip.rules.norms import underflow
from opacus_bpclip.rules.precision import norm_dtype

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
    dtype = norm_dtype(g.dtype)
    # The gradient's own squares may vanish, too.
    own = own + underflow(g.shape[2] * (inputs + 1), dtype)
    g_norm = torch.linalg.vector_norm(g, dim=(2, 3), dtype=dtype)
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
    joined = per_group[:, 0] if groups == 1 else torch.linalg.vector_norm(per_group, dim=1)
    return joined + underflow(count, per_group.dtype)


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
    """Yield ``batch`` examples, ``size`` at a time; an empty slice if there are none.

    All at once where a graph is traced for batches of any size, ``tensor.shape[0]`` of which is no
    number. (``len(tensor)`` always is one, and would make it a graph for one size.)
    """
    if not isinstance(batch, int):
        yield slice(None)
        return
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
    if weight:
        gradient = torch.matmul(g, u.transpose(-1, -2))
        norm = torch.linalg.vector_norm(gradient, dim=(2, 3))
    else:
        norm = torch.zeros(g.shape[:2], dtype=g.dtype, device=g.device)
    if bias:
        norm = torch.hypot(norm, torch.linalg.vector_norm(g.sum(-1), dim=2))
    return norm


def _gram_square(g: Tensor, u: Tensor, *, weight: bool, bias: bool) -> tuple[Tensor, Tensor]:
    """Return the squared norm of each group's gradient, never made, and ``g``'s norm. ``[B, R]``.

    ``norm(g u^T)^2 = sum_pq (g_p . g_q)(u_p . u_q)``.
    """
    gram = torch.matmul(g.transpose(-1, -2), g)
    g_norm = gram.diagonal(dim1=2, dim2=3).sum(dim=2).sqrt()
    columns = torch.matmul(u.transpose(-1, -2), u) if weight else torch.zeros_like(gram)
    if bias:
        columns = columns + 1
    return (gram * columns).sum(dim=(2, 3)), g_norm
