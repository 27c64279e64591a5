"""Gaussian noise for many gradients at once, in place: Opacus's own draws, some entries at a time.

A draw as large as a layer goes through memory that is fresh and so slow; a draw for each small
parameter is mostly overhead. So gradients are cut up and put together to sets of pieces that fit a
processor's cache, each with one draw. On a processor the draws of a large model are dealt out to
several streams, and as many threads draw at once as torch may use. Which stream an entry's noise
comes from depends on the gradients' sizes alone: the noise is the same for any number of threads.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch
from opacus.optimizers.optimizer import _generate_noise
from torch import Tensor

from opacus_bpclip.optimizer.streams import streams

_Draws = Sequence[Sequence[Tensor]]
_ToDo = deque[tuple[_Draws, torch.Generator | None]]

# Entries of one draw on a processor, and on an accelerator, which would rather do much at once.
_DRAW = 2**18
_LARGE_DRAW = 2**26

# A stream takes a while to seed: it has so many draws at least, and there are so many at most.
_DRAWS = 4
_STREAMS = 64

# Torch would start threads of its own for more entries, for each of ours.
_SERIAL = 2**15 - 64


def add_noise_(
    gradients: Sequence[Tensor],
    *,
    std: float,
    generator: torch.Generator | None,
    secure_mode: bool,
) -> None:
    """Add independent Gaussian noise of standard deviation ``std`` to every entry.

    The same noise for the same state of the generator, whatever the number of threads.

    Args:
        gradients: of any shapes; changed in place. No two share memory, see `with_own_memory`.
        std: of the noise; nothing is drawn for 0.
        generator: of the pseudo-random numbers; ``None`` for torch's default one.
        secure_mode: draw as Opacus does against attacks on floating-point numbers, all from the
            generator itself.

    Raises:
        Exception: what a draw raises, in whatever thread; some gradients have noise then.
    """
    if std == 0:
        return
    todo = _dealt(list(_draws(gradients)), generator, secure_mode=secure_mode)
    threads = min(torch.get_num_threads(), len(todo))
    work = partial(_add, todo, std=std, secure_mode=secure_mode, serial=threads > 1)
    if threads < 2:
        work()
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work) for _ in range(threads)]:
            done.result()


def _dealt(draws: _Draws, generator: torch.Generator | None, *, secure_mode: bool) -> _ToDo:
    """Deal the draws out to streams, or leave all of them to the generator."""
    if secure_mode or any(pieces[0].device.type != "cpu" for pieces in draws):
        return deque([(draws, generator)])
    each = max(_DRAWS, math.ceil(len(draws) / _STREAMS))
    shares = [draws[i : i + each] for i in range(0, len(draws), each)]
    sources = streams(generator or torch.default_generator, len(shares))
    if len(sources) < len(shares):
        return deque([(draws, sources[0])])
    return deque(zip(shares, sources, strict=False))


def _add(todo: _ToDo, *, std: float, secure_mode: bool, serial: bool) -> None:
    """Take shares of the draws, until there are none, and add noise to the pieces of each."""
    # Used for one draw after another: what a thread frees goes back to the system.
    room: Tensor | None = None
    while True:
        try:
            draws, generator = todo.popleft()
        except IndexError:
            return
        for drawn in draws:
            pieces = list(drawn)
            if serial:
                pieces = [part for piece in drawn for part in piece.split(_SERIAL)]
            sizes = [piece.numel() for piece in pieces]
            entries = sum(sizes)
            if (
                room is None
                or room.dtype != pieces[0].dtype
                or room.device != pieces[0].device
                or len(room) < entries
            ):
                room = pieces[0].new_empty(entries)
            noise = _noise(room[:entries], std, generator, secure_mode=secure_mode)
            torch._foreach_add_(pieces, list(noise.split(sizes)))


def _noise(
    room: Tensor, std: float, generator: torch.Generator | None, *, secure_mode: bool
) -> Tensor:
    """Return what Opacus draws; in ``room``, unless that is several draws."""
    if secure_mode:
        drawn: Tensor = _generate_noise(std, room, generator, secure_mode=True)
        return drawn
    return room.normal_(0, std, generator=generator)


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
    """Yield flat pieces, each set of one dtype and device and of as many entries as a draw has."""
    pending: dict[tuple[torch.dtype, torch.device], _Pieces] = {}
    for gradient in gradients:
        own = pending.setdefault((gradient.dtype, gradient.device), _Pieces())
        most = _DRAW if gradient.device.type == "cpu" else _LARGE_DRAW
        flat = _flat(gradient)
        for piece in flat.split(most) if flat.numel() > most else (flat,):
            if own.entries + piece.numel() > most:
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
