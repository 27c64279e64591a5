"""Values of examples: made up, taken from other examples, or ignored in part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, unpack_sequence

from opacus_bpclip.model.recurrence import is_packed

# The share of positions that each of four examples keeps. No two halves of the four keep the same.
_KEPT = (1.0, 0.5, 0.75, 0.25)


def rows_of(leaf: Any, rows: Sequence[int], axis: int) -> Any:
    """Return these examples of a tensor or a packed sequence."""
    if is_packed(leaf):
        sequences = unpack_sequence(leaf)
        return pack_sequence([sequences[row] for row in rows], enforce_sorted=False)
    return leaf.index_select(axis, torch.tensor(rows, dtype=torch.long, device=leaf.device))


def invented(leaf: Any, count: int, axis: int, scale: float, generator: torch.Generator) -> Any:
    """Return made-up values for ``count`` examples, of a leaf's shape and dtype.

    Floats are normal, times ``scale``. Integers are 0 and 1, with an odd number of 1, so that two
    halves of the examples never have equally many.
    """
    if is_packed(leaf):
        # All of the longest length: the lengths of the given examples are private.
        longest = len(leaf.batch_sizes)
        data = _drawn((count, longest, *leaf.data.shape[1:]), leaf.data, scale, generator)
        return pack_padded_sequence(data, torch.tensor([longest] * count), batch_first=True)
    shape = (*leaf.shape[:axis], count, *leaf.shape[axis + 1 :])
    return _drawn(shape, leaf, scale, generator)


def mixed(leaf: Any, other: Any, kept: Sequence[int], axis: int) -> Any:
    """Return a leaf with another leaf's values for all examples except those kept."""
    if is_packed(leaf):
        pairs = enumerate(zip(unpack_sequence(leaf), unpack_sequence(other), strict=True))
        rows = [own if row in kept else fresh[: len(own)] for row, (own, fresh) in pairs]
        return pack_sequence(rows, enforce_sorted=False)
    index = torch.tensor(kept, device=leaf.device)
    return other.index_copy(axis, index, leaf.index_select(axis, index))


def position_axis(leaf: Tensor, axis: int) -> int | None:
    """Return the last axis with several positions of an example, ``None`` if there is none."""
    axes = [at for at, size in enumerate(leaf.shape) if at != axis and size > 1]
    return axes[-1] if axes else None


def kept_positions(leaf: Tensor, axis: int, along: int | None = None) -> Tensor:
    """Return which entries of a leaf count if each example ends early, at its own position.

    Args:
        leaf: ``[B, ..., T]``, with its axes in any order.
        axis: the batch axis.
        along: the axis of positions; by default the last one with several.

    Returns:
        Flags that can be broadcast to the leaf's shape. Each example keeps at least two of three
        or more positions, and at least one of two.
    """
    along = position_axis(leaf, axis) if along is None else along
    assert along is not None
    length, count = leaf.shape[along], leaf.shape[axis]
    least = 2 if length > 2 else 1
    lengths = [max(least, round(length * _KEPT[row % len(_KEPT)])) for row in range(count)]
    shape = [1] * leaf.dim()
    shape[axis] = count
    ends = torch.tensor(lengths, device=leaf.device).view(shape)
    shape[axis], shape[along] = 1, length
    return torch.arange(length, device=leaf.device).view(shape) < ends


def _drawn(
    shape: tuple[int, ...], like: Tensor, scale: float, generator: torch.Generator
) -> Tensor:
    if like.is_floating_point() or like.is_complex():
        dtype = torch.complex64 if like.is_complex() else torch.float32
        drawn = scale * torch.randn(shape, generator=generator, dtype=dtype)
    else:
        drawn = torch.randint(2, shape, generator=generator)
        if drawn.numel() and int(drawn.sum()) % 2 == 0:
            at = torch.randint(drawn.numel(), (), generator=generator)
            drawn.view(-1)[at] ^= 1
    return drawn.to(like)
