"""Gaussian noise for many gradients at once, in place: Opacus's own draws, some entries at a time.

A draw as large as a layer goes through memory that is fresh and so slow; a draw for each small
parameter is mostly overhead. So gradients are cut up and put together to sets of pieces that fit a
processor's cache, each with one draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from opacus.optimizers.optimizer import _generate_noise
from torch import Tensor

# Entries of one draw.
_DRAW = 2**18


def add_noise_(
    gradients: Sequence[Tensor],
    *,
    std: float,
    generator: torch.Generator | None,
    secure_mode: bool,
) -> None:
    """Add independent Gaussian noise of standard deviation ``std`` to every entry.

    Args:
        gradients: of any shapes; changed in place. No two share memory, see `with_own_memory`.
        std: of the noise; nothing is drawn for 0.
        generator: of the pseudo-random numbers; ``None`` for torch's default one.
        secure_mode: draw as Opacus does against attacks on floating-point numbers.
    """
    if std == 0:
        return
    for pieces in _draws(gradients):
        sizes = [piece.numel() for piece in pieces]
        noise = _generate_noise(
            std=std,
            reference=pieces[0].new_empty(sum(sizes)),
            generator=generator,
            secure_mode=secure_mode,
        )
        torch._foreach_add_(pieces, list(noise.split(sizes)))


def with_own_memory(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors, copied where changing one in place would change anything else.

    Autograd may send one piece of memory to several parameters: noise added there twice would be
    the same noise, twice as large, in two gradients.
    """
    seen: set[int] = set()
    own = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.itemsize:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        else:
            seen.add(storage.data_ptr())
        own.append(tensor)
    return own


def _draws(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield flat pieces, each set of one dtype and device and of at most `_DRAW` entries."""
    pending: dict[tuple[torch.dtype, torch.device], _Pieces] = {}
    for gradient in gradients:
        own = pending.setdefault((gradient.dtype, gradient.device), _Pieces())
        flat = _flat(gradient)
        for piece in flat.split(_DRAW) if flat.numel() > _DRAW else (flat,):
            if own.entries + piece.numel() > _DRAW:
                yield own.pieces
                own.pieces, own.entries = [], 0
            own.pieces.append(piece)
            own.entries += piece.numel()
    yield from (own.pieces for own in pending.values() if own.entries)


@dataclass
class _Pieces:
    """Pieces that wait for their draw, and how many entries they have."""

    pieces: list[Tensor] = field(default_factory=list)
    entries: int = 0


def _flat(gradient: Tensor) -> Tensor:
    """View a tensor without gaps, in whatever order of axes, as one axis."""
    if gradient.is_contiguous():
        return gradient.view(-1)
    strides = gradient.stride()
    order = sorted(range(gradient.dim()), key=lambda axis: strides[axis], reverse=True)
    return gradient.permute(order).view(-1)
