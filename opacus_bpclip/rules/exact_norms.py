"""The exact bound: the norm of each example's weight gradient, computed in the cheapest way.

Shapes and guarantees are those of ``norms.py``. Proofs: ``docs/guarantee.md``. Costs:
``docs/cost-model.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from opacus_bpclip.rules.norms import underflow
from opacus_bpclip.rules.precision import norm_dtype

# Upper limits for the temporary columns or gradients of an exact bound, in bytes. On a CPU, small
# blocks stay in the cache and are cheap to allocate. A traced graph repeats its operations for
# each chunk, so it has fewer chunks; an accelerator prefers few large operations.
EXACT_MEMORY_CAP = 2 * 2**20
_TRACED_EXACT_MEMORY_CAP = 16 * 2**20
_ACCELERATOR_EXACT_MEMORY_CAP = 64 * 2**20

# To build the per-example gradients takes no more flops than to sum over the batch, but they are
# written once and read twice. Per number, that costs about as much as this many flops, as measured
# by benchmarks/exact_norm.py.
_FLOPS_OF_PASSES = 42


def exact_bound(
    g: Tensor,
    u: Tensor,
    norms: Tensor,
    *,
    weight: bool,
    bias: bool,
    slack: float,
    uses: Sequence[int] = (),
) -> Tensor:
    """Return the norm of each example's gradient, plus a margin for rounding errors. ``[B]``.

    Positions may cancel in the gradient, but their rounding errors do not. The margin is an upper
    bound on these errors, ``slack * norm(g) * norm(u)`` in Frobenius norms, summed over the uses.

    Args:
        g: ``[B, R, C, P]``, the upstream gradient.
        u: ``[B, R, D, P]``, the input columns without the bias's constant 1.
        norms: ``[B, R, P]``, the norms of the columns with the bias's constant 1.
        weight: whether the weight is trainable.
        bias: whether the bias is trainable.
        slack: the relative rounding error, from `rounding_margin`.
        uses: the number of positions of each use, if ``g`` and ``u`` have those of several. The
            upstream gradient of one may be among the columns of ``g``, and of another of ``u``: the
            product of the norms of all positions would grow with its square.
    """
    dtype = norm_dtype(g.dtype)
    g, u = g.to(dtype), u.to(dtype)
    channels, positions = g.shape[2:]
    inputs = u.shape[2]
    if positions == 1:
        g_norm = torch.linalg.vector_norm(g, dim=(2, 3)) + underflow(channels, dtype)
        return _joined(g_norm * norms[..., 0], g, inputs)
    if not gram_is_cheaper(positions, channels, inputs):
        # A gradient that is measured and not kept: the sum over the batch cancels once more, and
        # its rounding errors, which depend on a mean loss's batch size, must not be scaled up to
        # the limit. So the margin is as large as that of Gram matrices.
        own = _direct_norm(g, u, weight=weight, bias=bias)
        own = own + underflow(channels * (inputs + 1), dtype)  # of the squares of its entries
        product = _frobenius_product(_norm_of(g), g, norms, inputs, slack, uses)
        return _joined(torch.hypot(own, math.sqrt(slack) * product), g, inputs)
    squared, g_norm = _gram_square(g, u, weight=weight, bias=bias)
    error = slack * _frobenius_product(g_norm, g, norms, inputs, slack, uses).square()
    # The error is one of the square, and the square root may enlarge it: add it before the root.
    return _joined(torch.sqrt(squared.clamp(min=0) + error), g, inputs)


def own_bound(
    own: Tensor,
    g: Tensor,
    norms: Tensor,
    *,
    inputs: int,
    slack: float,
    uses: Sequence[int] = (),
) -> Tensor:
    """Return `exact_bound`, given the norm of each computed gradient. ``[B]``.

    Args:
        own: ``[B, R]``, the norm of each group's gradient, rounding errors included.
        g: ``[B, R, C, P]``, the upstream gradient.
        norms: ``[B, R, P]``, the norms of the columns with the bias's constant 1.
        inputs: the number ``D`` of inputs per group.
        slack: the relative rounding error, from `rounding_margin`.
        uses: the number of positions of each use, as in `exact_bound`.
    """
    dtype = norm_dtype(g.dtype)
    # The squares of the gradient's entries may underflow, too.
    own = own + underflow(g.shape[2] * (inputs + 1), dtype)
    g_norm = _norm_of(g)
    product = _frobenius_product(g_norm, g, norms, inputs, slack, uses)
    return _joined(own + slack * product, g, inputs)


def _frobenius_product(
    g_norm: Tensor, g: Tensor, norms: Tensor, inputs: int, slack: float, uses: Sequence[int] = ()
) -> Tensor:
    """Return the product of the norms of ``g`` and of the columns, for each group. ``[B, R]``.

    With several uses it is the sum of their products.

    What underflows in one norm is multiplied by the other norm. So both norms get an addend for
    underflow, large enough that it still counts after multiplication by ``slack``.
    """
    if len(uses) > 1:
        return sum(
            (
                _frobenius_product(_norm_of(part), part, columns, inputs, slack)
                for part, columns in zip(g.split(uses, 3), norms.split(uses, 2), strict=True)
            ),
            start=torch.zeros_like(g_norm),
        )
    channels, positions = g.shape[2:]
    g_slack = underflow(positions * channels, norms.dtype) / math.sqrt(slack)
    u_slack = underflow(positions * inputs, norms.dtype) / math.sqrt(slack)
    return (g_norm + g_slack) * (torch.linalg.vector_norm(norms, dim=2) + u_slack)


def _norm_of(g: Tensor) -> Tensor:
    """Return the norm of each group of ``g``. ``[B, R]``."""
    return torch.linalg.vector_norm(g, dim=(2, 3), dtype=norm_dtype(g.dtype))


def _joined(per_group: Tensor, g: Tensor, inputs: int) -> Tensor:
    """Return the norm over the groups, plus what may have underflowed on the way. ``[B]``."""
    groups, channels, positions = g.shape[1:]
    count = groups * positions * (positions + channels + inputs)
    joined = per_group[:, 0] if groups == 1 else torch.linalg.vector_norm(per_group, dim=1)
    return joined + underflow(count, per_group.dtype)


def gram_is_cheaper(positions: int, channels: int, inputs: int) -> bool:
    """Return whether two ``P x P`` Gram matrices cost less than the ``C x D`` gradient.

    This compares the flops for a gradient that is measured and then discarded.
    """
    return positions * positions * (channels + inputs) < positions * channels * inputs


def own_is_cheaper(positions: int, channels: int, inputs: int) -> bool:
    """Return whether two ``P x P`` Gram matrices cost at least as much as the ``C x D`` gradient.

    This is for a gradient that is measured, scaled and then added to the sum over the batch.
    """
    flops_of_gram = 2 * positions * positions * (channels + inputs)
    return flops_of_gram >= _FLOPS_OF_PASSES * channels * inputs


def exact_chunk(per_example: int, device: torch.device) -> int:
    """Return how many examples at a time keep temporary memory under the cap, at least 1.

    Args:
        per_example: the bytes that one example takes, from `exact_bytes`.
        device: the device of the tensors.
    """
    cap = EXACT_MEMORY_CAP
    if device.type != "cpu":
        cap = _ACCELERATOR_EXACT_MEMORY_CAP
    elif torch.compiler.is_compiling():
        cap = _TRACED_EXACT_MEMORY_CAP
    return max(1, cap // max(1, per_example))


def exact_bytes(positions: int, groups: int, channels: int, inputs: int, dtype: torch.dtype) -> int:
    """Return the bytes of temporary memory that `exact_bound` takes for one example."""
    gradient = channels * (inputs + 1)
    columns = positions * (inputs + channels)
    gram = 2 * positions * positions
    return groups * (columns + min(gradient, gram)) * norm_dtype(dtype).itemsize


def chunks(batch: int, size: int) -> Iterator[slice]:
    """Yield slices of ``size`` examples; one empty slice if ``batch`` is 0.

    In a graph that is traced for batches of any size, ``tensor.shape[0]`` is a symbol, not an
    ``int``: then one slice takes all examples. (``len(tensor)`` is always an ``int``, and would
    specialise the graph to one size.)
    """
    if not isinstance(batch, int):
        yield slice(None)
        return
    for start in range(0, max(batch, 1), size):
        yield slice(start, start + size)


def in_chunks(batch: int, chunk: int, bound: Callable[[slice], Tensor]) -> Tensor:
    """Compute one number per example, for ``chunk`` examples at a time. ``[B]``.

    Args:
        batch: the number of examples, ``tensor.shape[0]``.
        chunk: the number of examples at a time, from `exact_chunk`.
        bound: returns the numbers of the examples in a slice.

    Example:
        >>> in_chunks(5, 2, lambda rows: torch.arange(5)[rows])
        tensor([0, 1, 2, 3, 4])
    """
    parts = [bound(rows) for rows in chunks(batch, chunk)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _direct_norm(g: Tensor, u: Tensor, *, weight: bool, bias: bool) -> Tensor:
    """Compute each group's gradient and return its norm. ``[B, R]``."""
    if weight:
        gradient = torch.matmul(g, u.transpose(-1, -2))
        norm = torch.linalg.vector_norm(gradient, dim=(2, 3))
    else:
        norm = torch.zeros(g.shape[:2], dtype=g.dtype, device=g.device)
    if bias:
        norm = torch.hypot(norm, torch.linalg.vector_norm(g.sum(-1), dim=2))
    return norm


def _gram_square(g: Tensor, u: Tensor, *, weight: bool, bias: bool) -> tuple[Tensor, Tensor]:
    """Return the squared norm of each group's gradient, and ``g``'s norm, each ``[B, R]``.

    The gradient is never built: ``norm(g u^T)^2 = sum_pq (g_p . g_q)(u_p . u_q)``.
    """
    gram = torch.matmul(g.transpose(-1, -2), g)
    g_norm = gram.diagonal(dim1=2, dim2=3).sum(dim=2).sqrt()
    columns = torch.matmul(u.transpose(-1, -2), u) if weight else torch.zeros_like(gram)
    if bias:
        columns = columns + 1
    return (gram * columns).sum(dim=(2, 3)), g_norm
