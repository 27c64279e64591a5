"""Several processes that train one model: what they agree on before anything is added up.

A refusal must stop all of them, and none may step alone. So they meet at fixed points. At each one
they exchange a few public numbers and whether one refuses; the reasons are told only if one does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Self

from opacus_bpclip.errors import CoverageError

_REMEDY = (
    "Wrap the model before make_private: DifferentiallyPrivateDistributedDataParallel(model) of "
    "opacus.distributed, or fully_shard(model) of torch.distributed.fsdp. Or train in one process "
    "(torchrun --nproc-per-node 1, or no process group)."
)


# As many as a step has: all meetings exchange messages of one size.
_NUMBERS = 3


class Place(IntEnum):
    """Where ranks meet."""

    FORWARD = 0
    STEP = 1


class Purpose(IntEnum):
    """What a rank's own generator is for."""

    COINS = 0
    NOISE = 1


_ONE_ENTRY = (
    "One accountant's entry stands for all of them. Call make_private with the same model, data "
    "set and options on each rank."
)


def world_size() -> int:
    """Return how many processes the default process group has; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Ranks:
    """The processes that train one model together; one process alone by default.

    Args:
        size: how many there are.
        rank: which of them this one is.
        group: what they meet in.

    Attributes:
        sharded: whether forward and backward passes wait for the other ranks, which have a part of
            the parameters.
        graphs_problem: why no gradient may come out of a compiled graph, if none may.
        asked: whether one of the ranks has asked for something at the latest meeting.
        in_pass: whether a pass is at hand in which other ranks wait for this one.
        waits: whether this rank was at its step there and another one was not yet.
    """

    def __init__(self, size: int = 1, rank: int = 0, group: Any = None) -> None:
        self.size, self.rank = size, rank
        self._group = group
        self.sharded = False
        self.graphs_problem: str | None = None
        self.asked = self.waits = False
        self.in_pass = False
        self._untold: str | None = None  # this rank's refusal, until the next meeting
        self._given_up: str | None = None  # why the logical batch at hand makes no step

    @classmethod
    def of_process_group(cls) -> Self:
        """Return all ranks of the default process group. All of them must call this."""
        # Numbers on the host: no meeting waits for an accelerator, or mixes with its collectives.
        group = dist.new_group(backend="gloo", timeout=_patience())
        return cls(dist.get_world_size(), dist.get_rank(), group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """Return itself: a copy of an optimizer is in the same process."""
        return self

    def problem(self) -> str | None:
        """Say that this process is one of several that do not train together."""
        ranks = world_size()
        if ranks == self.size:
            return None
        return (
            f"This process is one of {ranks}, and the model was made private for {self.size}: each "
            "rank would sample, add noise and step on its own, and their models would drift apart "
            f"while the accountant sees one of them. {_REMEDY}"
        )

    # Meetings

    def meet(
        self,
        place: Place,
        numbers: Sequence[float] = (),
        *,
        refusal: str | None = None,
        asks: bool = False,
    ) -> str | None:
        """Wait for all ranks; return why none of them may go on, ``None`` if all may.

        Args:
            place: where this rank is.
            numbers: public numbers that must be the same on all ranks.
            refusal: why this rank refuses, if it does.
            asks: what `asked` is to tell all ranks.
        """
        if self.size == 1:
            self.asked = asks
            return refusal
        refusal = self._untold or refusal
        self._untold = None
        self.in_pass = False
        own = torch.tensor(
            [place, refusal is not None, *numbers, *(0,) * (_NUMBERS - len(numbers))],
            dtype=torch.float64,
        )
        both = torch.cat([own, -own, own.new_tensor([asks])])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self._group)
        largest, smallest = both[: len(own)], -both[len(own) : -1]
        self.asked = bool(both[-1])
        elsewhere = bool(largest[0] != smallest[0])
        self.waits = elsewhere and place is Place.STEP
        if not largest[1] and (elsewhere or torch.equal(largest, smallest)):
            self.in_pass = self.sharded and (elsewhere or place is Place.FORWARD)
            return None
        problem = self._told(refusal, numbers)
        self._given_up = problem
        return problem

    def _told(self, refusal: str | None, numbers: Sequence[float]) -> str:
        """Return what all ranks have to say."""
        reports: list[Any] = [None] * self.size
        dist.all_gather_object(reports, (refusal, tuple(numbers)), group=self._group)
        if refusal is not None:
            return refusal
        for rank, (reason, _) in enumerate(reports):
            if reason is not None:
                return (
                    f"Rank {rank} of {self.size} has refused its part of this step, so no rank "
                    f"takes it: {reason}"
                )
        each = ", ".join(f"rank {rank} has {numbers}" for rank, (_, numbers) in enumerate(reports))
        return (
            "The ranks differ in (noise_multiplier, max_grad_norm, batches in the step): "
            f"{each}. Clipped sums of several scales would meet noise of one. Change these numbers "
            "on all ranks alike, between the same two steps."
        )

    def refuse(self, reason: str) -> None:
        """Tell the others that this rank refuses, as soon as they listen.

        That is at their next meeting, so this one waits for them now: it may not live to see its
        own. In a pass in which they wait for this one, they are told when it is over.
        """
        if self.size == 1 or self._given_up is not None:
            return
        if self.in_pass:
            self._untold = self._untold or reason
        else:
            self.meet(Place.STEP, refusal=reason)

    @property
    def given_up(self) -> str | None:
        """Return why the ranks have given up the logical batch at hand, ``None`` if they have not.

        What is left of it on this rank must not be added to the others' next batch.
        """
        return self._given_up

    def begin_batch(self) -> None:
        """Note that a logical batch has ended."""
        self._given_up = None

    # Before training

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise on all ranks what is raised on one of them: a `ValueError` or `CoverageError`.

        Nothing inside may wait for other ranks.
        """
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        reports: list[Any] = [None] * self.size
        told = error and (isinstance(error, CoverageError), f"{type(error).__name__}: {error}")
        dist.all_gather_object(reports, told, group=self._group)
        if error is not None:
            raise error
        for rank, report in enumerate(reports):
            if report is not None:
                kind = CoverageError if report[0] else ValueError
                raise kind(
                    f"Rank {rank} of {self.size} has refused, so no rank trains: {report[1]}"
                )

    def require_equal(
        self, settings: Mapping[str, object], why: str = _ONE_ENTRY, *, known_only: bool = False
    ) -> None:
        """Compare settings.

        Args:
            settings: this rank's.
            why: what differences do, and what is to be done.
            known_only: whether a rank may lack some, which then are not compared with its own.

        Raises:
            ValueError: they differ between ranks.
        """
        if self.size == 1:
            return
        reports: list[Any] = [None] * self.size
        dist.all_gather_object(reports, settings, group=self._group)
        # Of all ranks: all of them raise, or none.
        for name in dict.fromkeys(name for report in reports for name in report):
            lacking = [] if known_only else [None]
            values = [
                v for report in reports for v in ([report[name]] if name in report else lacking)
            ]
            if any(value != values[0] for value in values):
                raise ValueError(
                    f"The ranks differ in {name}: {', '.join(map(str, values))}. {why}"
                )

    def require_equal_values(self, tensors: Mapping[str, Tensor]) -> None:
        """Compare sums over the values of named tensors.

        Raises:
            ValueError: they differ between ranks.
        """
        if self.size > 1:
            sums = {n: x.detach().double().nan_to_num().flatten() for n, x in tensors.items()}
            self.require_equal({n: (float(x.sum()), float(x.abs().sum())) for n, x in sums.items()})

    def seed_of_rank(self, generator: torch.Generator | None, purpose: Purpose) -> int:
        """Return a seed that no other rank has, drawn from rank 0's ``generator``.

        Generators that are seeded alike would draw the same numbers: coins of two examples that
        fall alike, noise in two places that cancels in their difference, noise that shows coins.
        Seeds of one draw differ in their low 32 bits, which is all that a processor's generator
        uses; so they do for two purposes, whose generators the user may have seeded alike.
        """
        device = "cpu" if generator is None else generator.device
        drawn = torch.randint(2**62, (), generator=generator, device=device).cpu()
        dist.broadcast(drawn, 0, group=self._group)
        (first,) = np.random.SeedSequence([int(drawn)]).generate_state(1)
        place = len(Purpose) * self.rank + purpose
        low = _permuted((int(first) + place) % 2**32)
        (high,) = np.random.SeedSequence([int(drawn), self.rank, purpose]).generate_state(1)
        return (int(high) >> 1) << 32 | low


def _permuted(number: int) -> int:
    """Return another number of 32 bits for each, far apart for neighbours (murmur's last steps)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        number = (number ^ number >> shift) * factor % 2**32
    return number


def _patience() -> timedelta | None:
    """Return how long the default group waits for a rank; ``None`` where torch does not say."""
    group = dist.distributed_c10d._get_default_group()
    try:
        options = [group._get_backend(device).options for device in group._device_types]
        return max(option._timeout for option in options)
    except (AttributeError, RuntimeError, ValueError):
        return None
