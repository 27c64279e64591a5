"""Without noise: how far one example moves the sum, against the sensitivity that is claimed."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opacus_bpclip.audit.target import Batch, Target, empty, join, rows, spiked

SEARCHES = 60

# Units of the last place that the difference of two sums may lose.
_ULPS = 64
_SCALES = (-1e8, -1e3, -1.0, 1e-3, 1.0, 1e3, 1e8)


@dataclass(frozen=True)
class Neighbours:
    """The largest change found.

    Attributes:
        sensitivity: claimed.
        change: largest L2 norm of ``S(D + z) - S(D)`` that was found; infinite if not finite.
        allowed: the sensitivity, and what rounding may add to that very change.
        where: which pair of neighbours showed it.
        pairs: how many pairs were tried.
        expected: whether a canary was known to reach the sensitivity.
    """

    sensitivity: float
    change: float
    allowed: float
    where: str
    pairs: int
    expected: bool

    @property
    def ratio(self) -> float:
        """The largest change over the claimed sensitivity."""
        return self.change / self.sensitivity

    @property
    def violations(self) -> tuple[str, ...]:
        """What breaks the claim."""
        if self.change <= self.allowed:
            return ()
        text = f"one example moves the sum by {self.ratio:.4g} times the claimed sensitivity"
        return (f"{text} ({self.where})",)

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why a pass would mean little."""
        if not self.expected or self.ratio >= 0.99:
            return ()
        return (f"the worst case reaches only {self.ratio:.4g} of the sensitivity",)


def search(target: Target, *, seed: int, searches: int = SEARCHES) -> tuple[Neighbours, Batch]:
    """Try pairs of neighbours on a trainer without noise.

    Args:
        target: what is audited.
        seed: of the search.
        searches: how many examples to make up, besides the target's own canaries.

    Returns:
        The worst pair of all, and the example that moves the target's first batch the furthest.
    """
    trainer = target.trainer(0.0, seed)
    sensitivity = trainer.sensitivity
    tried: list[Neighbours] = []
    beside_first: list[tuple[float, Batch]] = []
    for place, batch, examples in _pairs(target, torch.Generator().manual_seed(seed), searches):
        before = trainer.on(batch)
        size = max(1.0, float(before.norm()) / sensitivity)
        allowed = sensitivity * (1 + _ULPS * torch.finfo(before.dtype).eps * size)
        for name, z in examples:
            change = float((trainer.on(join(batch, z)) - before).norm())
            change = math.inf if math.isnan(change) else change
            where = f"{name} added to {place} of {len(batch[0])} examples"
            tried.append(Neighbours(sensitivity, change, allowed, where, 1, target.attained))
            if batch is target.batches[0]:
                beside_first.append((change, z))
    worst = max(tried, key=lambda pair: pair.change / pair.allowed)
    largest = max(change for change, _ in beside_first)
    # Of nearly equal ones the earliest: the target's own canaries are tried first.
    canary = next(z for change, z in beside_first if change >= largest * (1 - 1e-3))
    return replace(worst, pairs=len(tried)), canary


def _pairs(
    target: Target, generator: torch.Generator, searches: int
) -> Iterator[tuple[str, Batch, list[tuple[str, Batch]]]]:
    """Yield batches, each with its name and the named examples to add to it, one at a time."""
    first = target.batches[0]
    pool = functools.reduce(join, target.canaries, first)
    own = [(f"canary {i}", z) for i, z in enumerate(target.canaries, 1)]
    if not own:
        own = [(f"example {i + 1}", rows(pool, [i])) for i in range(len(pool[0]))]
    yield "the first batch", first, own
    yield "an empty batch", empty(first), own
    for number, batch in enumerate(target.batches[1:], 2):
        yield f"batch {number} of {len(target.batches)}", batch, own[:1]
    made_up: list[tuple[str, Batch]] = []
    for _ in range(searches):
        example = rows(pool, [_below(len(pool[0]), generator)])
        made_up.append(("a made-up example", tuple(_disturbed(x, generator) for x in example)))
    yield "the first batch", first, made_up
    for candidate in made_up:
        size = _below(len(pool[0]) + 1, generator)
        members = torch.randint(len(pool[0]), (size,), generator=generator).tolist()
        yield "a made-up batch", rows(pool, members), [candidate]


def _disturbed(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Rescale, replace or rearrange one example's entries."""
    kind = float(torch.rand((), generator=generator))
    entry = _below(max(tensor.numel(), 1), generator)
    if kind < 0.2 or tensor.numel() == 0:
        return tensor
    if not tensor.is_floating_point():
        # Ids and classes: only values that occur.
        values = tensor.flatten()
        if kind < 0.6:
            return values[entry].expand_as(tensor).clone()
        shuffled = torch.randperm(len(values), generator=generator)
        return values[shuffled].view_as(tensor)
    scale = _SCALES[_below(len(_SCALES), generator)]
    if kind < 0.4:
        return tensor * scale
    if kind < 0.7:
        return torch.randn(tensor.shape, generator=generator).to(tensor) * scale
    return spiked(tensor, [entry], scale)


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))
