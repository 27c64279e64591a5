"""The same randomness on neighbouring batches: nothing about the noise may depend on the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opacus_bpclip.audit.neighbours import quiet_trainer, seeded_trainer, sum_without_noise
from opacus_bpclip.audit.target import Batch, Target, Trainer, empty, join


@dataclass(frozen=True)
class Replay:
    """What differed between neighbouring worlds, or was wrong in both.

    Attributes:
        pairs: how many pairs of neighbours were replayed.
        draws: random tensors drawn in one step's noise.
        differences: what breaks the claim; empty if nothing does.
    """

    pairs: int
    draws: int
    differences: tuple[str, ...]

    @property
    def violations(self) -> tuple[str, ...]:
        """Say what breaks the claim."""
        return self.differences


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
    differences: list[str] = []
    draws = 0
    first = target.batches[0]
    pairs = ((empty(first), "an empty batch"), (first, f"a batch of {len(first[0])}"))
    for batch, place in pairs:
        without = _run(target, batch, noise_multiplier, seed)
        with_canary = _run(target, join(batch, canary), noise_multiplier, seed)
        differences += [f"{text} (beside {place})" for text in _compared(without, with_canary)]
        draws = len(without.calls)
    return Replay(len(pairs), draws, tuple(dict.fromkeys(differences)))


@dataclass(frozen=True)
class _World:
    """One step of a fresh trainer."""

    trainer: Trainer
    calls: tuple[str, ...]
    noise: Tensor | None
    tolerance: float


def _run(target: Target, batch: Batch, noise_multiplier: float, seed: int) -> _World:
    total = sum_without_noise(quiet_trainer(target, seed), batch)
    trainer = seeded_trainer(target, noise_multiplier, seed)
    trainer.compute(batch)
    # What came before may have drawn as many numbers as there are examples: dropout does.
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
    found += _wrong_entries(without.trainer, histories[0])
    return found


def _wrong_entries(trainer: Trainer, history: Sequence[tuple[float, float, int]]) -> list[str]:
    """Compare the accountant's entries, if there are any, with the one step that was taken."""
    if not history:
        return []
    entries = [(multiplier, steps) for multiplier, _, steps in history]
    if entries == [(trainer.noise_multiplier, 1)]:
        return []
    text = ", ".join(f"{steps} at noise multiplier {value:g}" for value, steps in entries)
    return [f"one step was accounted as {text}, not 1 at {trainer.noise_multiplier:g}"]


class _RandomCalls(TorchDispatchMode):
    """Write down each call of an operation that draws random numbers."""

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
            shape = tuple(result.shape) if isinstance(result, Tensor) else ()
            dtype = str(result.dtype).removeprefix("torch.") if isinstance(result, Tensor) else ""
            self.calls.append(f"{func.overloadpacket}{numbers}{list(shape)} {dtype}".rstrip())
        return result


def _short(calls: Sequence[str]) -> str:
    shown = ", ".join(calls[:3]) or "none"
    return shown if len(calls) <= 3 else f"{shown} and {len(calls) - 3} more"
