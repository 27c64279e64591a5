"""Replay the same randomness on neighbouring batches: the noise must not depend on the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opacus_bpclip.audit.target import Batch, Target, Trainer, empty, join


@dataclass(frozen=True)
class Replay:
    """What differed between neighbouring worlds, or was wrong in both.

    Attributes:
        pairs: how many pairs of neighbours were replayed.
        draws: random tensors drawn in one step's noise.
        violations: what breaks the claim; empty if nothing does.
    """

    pairs: int
    draws: int
    violations: tuple[str, ...]

    doubts: ClassVar[tuple[str, ...]] = ()


def replay(target: Target, canary: Batch, *, noise_multiplier: float, seed: int) -> Replay:
    """Release from neighbouring batches with the same seeds, and compare what was random.

    Compared: each call of a random operation while the step is finished (which one, its shape,
    precision and numeric arguments), whether the step was skipped, the accountant's entries, and
    the noise itself.

    Args:
        target: what is audited.
        canary: the example by which neighbours differ.
        noise_multiplier: of the noise.
        seed: of both worlds.
    """
    found: list[str] = []
    draws = 0
    first = target.batches[0]
    pairs = ((empty(first), "an empty batch"), (first, f"a batch of {len(first[0])}"))
    for batch, place in pairs:
        without = _run(target, batch, noise_multiplier, seed)
        with_canary = _run(target, join(batch, canary), noise_multiplier, seed)
        found += [f"{text} (beside {place})" for text in _compared(without, with_canary)]
        draws = len(without.calls)
    return Replay(len(pairs), draws, tuple(found))


@dataclass(frozen=True)
class _World:
    """One step of a fresh trainer."""

    trainer: Trainer
    calls: tuple[str, ...]
    noise: Tensor | None
    tolerance: float


def _run(target: Target, batch: Batch, noise_multiplier: float, seed: int) -> _World:
    total = target.trainer(0.0, seed).on(batch)
    trainer = target.trainer(noise_multiplier, seed)
    trainer.compute(batch)
    # The forward pass may have drawn a number for each example, as dropout does.
    torch.manual_seed(seed)
    with _RandomCalls() as recorded:
        released = trainer.release()
    noise = None if released is None else released - total
    scale = float(total.abs().max()) + trainer.sensitivity * (1 + noise_multiplier)
    tolerance = 64 * torch.finfo(total.dtype).eps * scale
    return _World(trainer, tuple(recorded.calls), noise, tolerance)


def _compared(without: _World, with_canary: _World) -> list[str]:
    found = []
    if without.calls != with_canary.calls:
        found.append(
            f"the random calls depend on the data: {_short(without.calls)} without the canary, "
            f"{_short(with_canary.calls)} with it"
        )
    skipped = without.noise is None, with_canary.noise is None
    if skipped[0] != skipped[1]:
        found.append("whether the step is skipped depends on the data")
    elif without.noise is None or with_canary.noise is None:
        found.append("the step was skipped: nothing was released")
    else:
        apart = float((without.noise - with_canary.noise).abs().max())
        if not apart <= without.tolerance + with_canary.tolerance:
            found.append(
                f"the same randomness gives other noise: apart by {apart:.3g}, with a standard "
                f"deviation of {without.trainer.noise_multiplier * without.trainer.sensitivity:.3g}"
            )
    histories = without.trainer.history(), with_canary.trainer.history()
    if list(histories[0]) != list(histories[1]):
        found.append("the accountant's entries depend on the data")
    entries = [(multiplier, steps) for multiplier, _, steps in histories[0]]
    claimed = without.trainer.noise_multiplier
    if entries and entries != [(claimed, 1)]:
        text = ", ".join(f"{steps} at noise multiplier {value:g}" for value, steps in entries)
        found.append(f"one step was accounted as {text}, not 1 at {claimed:g}")
    return found


class _RandomCalls(TorchDispatchMode):
    """Record each call of an operation that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation as it is."""
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            numbers = [value for value in args if isinstance(value, (int, float))]
            drawn = ""
            if isinstance(result, Tensor):
                drawn = f"{list(result.shape)} {str(result.dtype).removeprefix('torch.')}"
            self.calls.append(f"{func.overloadpacket}{numbers}{drawn}")
        return result


def _short(calls: Sequence[str]) -> str:
    shown = ", ".join(calls[:3]) or "none"
    return shown if len(calls) <= 3 else f"{shown} and {len(calls) - 3} more"
