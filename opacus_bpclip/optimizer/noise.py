"""Gaussian noise for many gradients, added in place, with Opacus's draws in blocks of fixed size.

A draw as large as a layer needs newly allocated memory, which is slow. A draw for each small
parameter is mostly overhead. So the gradients are cut and grouped into blocks that fit a CPU's
cache, with one draw for each block. On the CPU the blocks of a large model are divided among
several streams of random numbers, and as many threads draw at once as torch may use. An entry's
stream depends only on the gradients' sizes, so the noise is the same for any number of threads.
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

from opacus_bpclip.guard.streams import streams

_Draws = Sequence[Sequence[Tensor]]
_ToDo = deque[tuple[_Draws, torch.Generator | None]]

# The entries of one draw, on a CPU and on an accelerator, where larger draws are faster.
_DRAW = 2**18
_LARGE_DRAW = 2**26

# Seeding a stream takes time: the least draws for a stream, and the most streams.
_DRAWS = 4
_STREAMS = 64

# With more entries torch would start its own threads inside each of ours.
_SERIAL = 2**15 - 64


def add_noise_(
    gradients: Sequence[Tensor],
    *,
    std: float,
    generator: torch.Generator | None,
    secure_mode: bool,
) -> None:
    """Add independent Gaussian noise of standard deviation ``std`` to every entry.

    The noise depends on the generator's state, and not on the number of threads.

    Args:
        gradients: of any shapes; changed in place. No two share memory, see `with_own_memory`.
        std: the standard deviation; with 0 nothing is drawn.
        generator: the source of pseudo-random numbers; ``None`` for torch's default generator.
        secure_mode: draw as Opacus does against attacks on floating-point numbers, with the given
            generator only.

    Raises:
        Exception: a draw has failed, in any thread. Some gradients then have noise and some not.
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
    """Divide the draws among streams, or leave all of them to the given generator."""
    if secure_mode or any(pieces[0].device.type != "cpu" for pieces in draws):
        return deque([(draws, generator)])
    each = max(_DRAWS, math.ceil(len(draws) / _STREAMS))
    shares = [draws[i : i + each] for i in range(0, len(draws), each)]
    sources = streams(generator or torch.default_generator, len(shares))
    if len(sources) < len(shares):
        return deque([(draws, sources[0])])
    return deque(zip(shares, sources, strict=False))


def _add(todo: _ToDo, *, std: float, secure_mode: bool, serial: bool) -> None:
    """Take shares of draws until none is left, and add noise to the pieces of each draw."""
    # Memory for all draws of this thread: allocated anew for each, it would come from the system.
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
    """Return the noise that Opacus draws, in ``room``; in secure mode in new memory."""
    if secure_mode:
        drawn: Tensor = _generate_noise(std, room, generator, secure_mode=True)
        return drawn
    return room.normal_(0, std, generator=generator)


def with_own_memory(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors, each copied if it shares memory with anything else.

    Autograd may send the same memory to several parameters. Noise added there for each of them
    would be one sum of draws, the same in all their gradients, instead of independent noise.
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
    """Yield the draws: flat pieces of one dtype and device, together as large as a draw may be."""
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
    """The pieces collected for the next draw, and their number of entries."""

    pieces: list[Tensor] = field(default_factory=list)
    entries: int = 0


def _flat(gradient: Tensor) -> Tensor:
    """View a tensor whose memory has no gaps as a vector, for any order of its axes."""
    if gradient.is_contiguous():
        return gradient.view(-1)
    strides = gradient.stride()
    order = sorted(range(gradient.dim()), key=lambda axis: strides[axis], reverse=True)
    return gradient.permute(order).view(-1)
