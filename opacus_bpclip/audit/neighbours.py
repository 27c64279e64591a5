"""Without noise: how far one example moves the sum, against the sensitivity that is claimed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opacus_bpclip.audit.target import Batch, Target, Trainer, empty, join, rows

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
    def violations(self) -> tuple[str, ...]:
        """Say what breaks the claim."""
        if self.change <= self.allowed:
            return ()
        return (
            f"one example moves the sum by {self.change / self.sensitivity:.4g} times the claimed "
            f"sensitivity ({self.where})",
        )

    @property
    def doubts(self) -> tuple[str, ...]:
        """Say why a pass would mean little."""
        if not self.expected or self.change >= 0.99 * self.sensitivity:
            return ()
        return (
            f"the worst case reaches only {self.change / self.sensitivity:.4g} of the sensitivity",
        )


class NeighbourSearch:
    """Try pairs of neighbours on a trainer without noise, and keep the worst.

    Args:
        target: what is audited.
        seed: of the search.
        searches: how many examples to make up, besides the target's own canaries.

    Attributes:
        canary: the example that moves the target's first batch the furthest.
        result: the worst pair of all.
    """

    def __init__(self, target: Target, *, seed: int = 0, searches: int = SEARCHES) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._trainer = quiet_trainer(target, seed)
        self._target = target
        self._worst = (-1.0, 0.0, 0.0, "")  # excess, change, allowed, where
        self._pairs = 0
        first = target.batches[0]
        pool = first
        for canary in target.canaries:
            pool = join(pool, canary)
        candidates = self._own_canaries(pool)
        self.canary, self._best = candidates[0][1], 0.0
        self._beside(first, "the first batch", candidates)
        self._beside(empty(first), "an empty batch", candidates)
        for number, batch in enumerate(target.batches[1:], 2):
            place = f"batch {number} of {len(target.batches)}"
            self._beside(batch, place, candidates[:1])
        made_up = [("a made-up example", z) for z in self._made_up(pool, searches)]
        self._beside(first, "the first batch", made_up)
        for candidate in made_up:
            size = int(torch.randint(len(pool[0]) + 1, (), generator=self._generator))
            self._beside(self._some_of(pool, size), "a made-up batch", [candidate])
        _, change, allowed, where = self._worst
        self.result = Neighbours(
            sensitivity=self._trainer.sensitivity,
            change=change,
            allowed=allowed,
            where=where,
            pairs=self._pairs,
            expected=target.attained,
        )

    def _own_canaries(self, pool: Batch) -> list[tuple[str, Batch]]:
        if self._target.canaries:
            return [(f"canary {i}", z) for i, z in enumerate(self._target.canaries, 1)]
        return [(f"example {i + 1}", rows(pool, [i])) for i in range(len(pool[0]))]

    def _beside(self, batch: Batch, place: str, candidates: list[tuple[str, Batch]]) -> None:
        """Add each candidate to a batch in turn."""
        before = sum_without_noise(self._trainer, batch)
        sensitivity = self._trainer.sensitivity
        size = max(1.0, float(before.norm()) / sensitivity)
        allowed = sensitivity * (1 + _ULPS * torch.finfo(before.dtype).eps * size)
        for name, z in candidates:
            change = float((sum_without_noise(self._trainer, join(batch, z)) - before).norm())
            change = math.inf if math.isnan(change) else change
            self._pairs += 1
            if change / allowed > self._worst[0]:
                where = f"{name} added to {place} of {len(batch[0])} examples"
                self._worst = (change / allowed, change, allowed, where)
            # Only if it is clearly worse: the target's own canary is the cleaner one.
            if batch is self._target.batches[0] and change > self._best * (1 + 1e-3):
                self.canary, self._best = z, change

    def _made_up(self, pool: Batch, count: int) -> Iterator[Batch]:
        for _ in range(count):
            index = int(torch.randint(len(pool[0]), (), generator=self._generator))
            yield tuple(self._disturbed(tensor) for tensor in rows(pool, [index]))

    def _some_of(self, pool: Batch, size: int) -> Batch:
        index = torch.randint(len(pool[0]), (size,), generator=self._generator)
        return rows(pool, index.tolist())

    def _disturbed(self, tensor: Tensor) -> Tensor:
        """Rescale, replace or rearrange one example's entries."""
        kind = float(torch.rand((), generator=self._generator))
        entry = int(torch.randint(max(tensor.numel(), 1), (), generator=self._generator))
        if kind < 0.2 or tensor.numel() == 0:
            return tensor
        if not tensor.is_floating_point():
            # Ids and classes: only values that occur.
            values = tensor.flatten()
            if kind < 0.6:
                return values[entry].expand_as(tensor).clone()
            shuffled = torch.randperm(len(values), generator=self._generator)
            return values[shuffled].view_as(tensor)
        scale = _SCALES[int(torch.randint(len(_SCALES), (), generator=self._generator))]
        if kind < 0.4:
            return tensor * scale
        if kind < 0.7:
            return torch.randn(tensor.shape, generator=self._generator).to(tensor) * scale
        spike = torch.zeros_like(tensor)
        spike.view(-1)[entry] = scale
        return spike


def quiet_trainer(target: Target, seed: int) -> Trainer:
    """Return a trainer of the target without noise, from its seeded start."""
    return seeded_trainer(target, 0.0, seed)


def seeded_trainer(target: Target, noise_multiplier: float, seed: int) -> Trainer:
    """Return a trainer that starts from parameters which only the seed decides."""
    torch.manual_seed(seed)
    return target.make(noise_multiplier)


def sum_without_noise(trainer: Trainer, batch: Batch) -> Tensor:
    """Return the sum that a trainer without noise releases, zeros if it skips the step."""
    released = trainer.on(batch)
    if released is None:
        return torch.zeros(sum(p.numel() for p in trainer.parameters))
    return released
