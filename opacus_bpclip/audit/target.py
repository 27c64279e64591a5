"""What is audited: one training step, and the batches to try it on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# One or more tensors with the examples on the first axis, as a loader yields them.
Batch = tuple[Tensor, ...]

# An entry that every limit clips.
LARGE = 1e4


class Trainer(ABC):
    """One private training step of any code. A subclass says how to compute gradients and to step.

    Args:
        parameters: those whose ``.grad`` holds the release after `step`.
        noise_multiplier: claimed: standard deviation of the noise over ``sensitivity``.
        sensitivity: claimed: L2 sensitivity of ``.grad * divisor``.
        divisor: the public constant that the noisy sum was divided by.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        noise_multiplier: float,
        sensitivity: float,
        divisor: float = 1.0,
    ) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.noise_multiplier = noise_multiplier
        self.sensitivity = sensitivity
        self.divisor = divisor
        self._first = [p.detach().clone() for p in self.parameters]

    @abstractmethod
    def compute(self, batch: Batch) -> None:
        """Clear the gradients, and run the forward and the backward pass on a batch."""

    @abstractmethod
    def step(self) -> None:
        """Finish the private step: clip, if `compute` has not, add noise, and update.

        Afterwards each ``.grad`` holds what was released, or ``None`` if the step was skipped.
        """

    def history(self) -> Sequence[tuple[float, float, int]]:
        """Return the accountant's entries (noise multiplier, sample rate, steps), if it has any."""
        return ()

    def restart(self) -> None:
        """Put the parameters back to their first values."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self._first)

    def release(self) -> Tensor | None:
        """Finish the step; return the noisy sum as one vector, or ``None`` if it was skipped.

        On a processor, wherever the parameters are.
        """
        self.step()
        if all(p.grad is None for p in self.parameters):
            return None
        blocks = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        return torch.cat([block.flatten() for block in blocks]).cpu() * self.divisor

    def on(self, batch: Batch) -> Tensor:
        """Return what a step on this batch releases, from the first parameters.

        Zeros if the step was skipped.
        """
        self.restart()
        self.compute(batch)
        released = self.release()
        if released is None:
            return torch.zeros(sum(p.numel() for p in self.parameters))
        return released


@dataclass(frozen=True)
class Target:
    """A way of training, and the examples it is tried on.

    Args:
        name: for reports.
        make: makes a fresh trainer with this noise multiplier, 0 for none. It may draw from torch's
            global generator, which the audit seeds.
        batches: what neighbours start from; the statistical checks use the first one. The empty
            batch is always tried as well.
        canaries: single examples likely to move the sum as far as is allowed; others are searched
            for.
        attained: whether a canary is known to reach the sensitivity. If so, an audit that measures
            less is too weak, and says so.
    """

    name: str
    make: Callable[[float], Trainer]
    batches: tuple[Batch, ...]
    canaries: tuple[Batch, ...] = ()
    attained: bool = False

    def trainer(self, noise_multiplier: float, seed: int) -> Trainer:
        """Return a fresh trainer whose parameters only the seed decides."""
        torch.manual_seed(seed)
        return self.make(noise_multiplier)


def join(batch: Batch, other: Batch) -> Batch:
    """Return a batch with another's examples added."""
    return tuple(torch.cat(pair) for pair in zip(batch, other, strict=True))


def rows(batch: Batch, index: Sequence[int] | slice) -> Batch:
    """Return some of a batch's examples."""
    return tuple(tensor[index] for tensor in batch)


def empty(batch: Batch) -> Batch:
    """Return a batch without examples."""
    return rows(batch, slice(0))


def spiked(like: Tensor, places: Sequence[int], size: float = LARGE) -> Tensor:
    """Return zeros of a tensor's shape with single large entries at flat places."""
    spike = torch.zeros_like(like)
    spike.view(-1)[list(places)] = size
    return spike
