"""Several processes (ranks) that train one model: how they agree before they add up gradients.

A refusal must stop all ranks, and no rank may step alone. So they meet at fixed points. At each
meeting they exchange a few public numbers and whether one of them refuses. They exchange the
reasons only if one does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Self

from opacus_bpclip.errors import CoverageError
from opacus_bpclip.guard.groups import end_after, new_group
from opacus_bpclip.guard.seeds import Purpose, seed_of

_REMEDY = (
    "Wrap the model before make_private: DifferentiallyPrivateDistributedDataParallel(model) of "
    "opacus.distributed, or fully_shard(model) of torch.distributed.fsdp. Or train in one process "
    "(torchrun --nproc-per-node 1, or no process group)."
)


# How many numbers a rank sends at a step; all meetings exchange messages of this size.
_NUMBERS = 4


class Place(IntEnum):
    """A point at which ranks meet."""

    FORWARD = 0
    STEP = 1


_ONE_ENTRY = (
    "The accountant has one entry for all ranks together. Call make_private with the same model, "
    "data set and options on each rank."
)


def world_size() -> int:
    """Return the number of processes in the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Ranks:
    """The processes that train one model together; one process alone by default.

    Args:
        size: the number of ranks.
        rank: this process's rank.
        group: the process group that they meet in.

    Attributes:
        sharded: whether each rank has a part of the parameters, so that forward and backward
            passes wait for the other ranks.
        graphs_problem: why gradients from compiled graphs are refused; ``None`` if they are not.
        asked: whether one of the ranks passed ``asks=True`` to the latest meeting.
        in_pass: whether other ranks wait for this one inside a pass.
        waits: whether, at the latest meeting, this rank was at its step and another one was not.
    """

    def __init__(self, size: int = 1, rank: int = 0, group: Any = None) -> None:
        self.size, self.rank = size, rank
        self._group = group
        self.sharded = False
        self.graphs_problem: str | None = None
        self.asked = self.waits = False
        self.in_pass = False
        self._unreported: str | None = None  # this rank's refusal, until the next meeting
        self._given_up: str | None = None  # why the current logical batch makes no step
        self._left: str | None = None  # why this rank lacks a step that others may have taken

    @classmethod
    def of_process_group(cls) -> Self:
        """Return all ranks of the default process group. All of them must call this."""
        group = new_group()
        ranks = cls(dist.get_world_size(), dist.get_rank(), group)
        end_after(ranks, group)
        return ranks

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """Return this object: an optimizer's copy is in the same process."""
        return self

    def problem(self) -> str | None:
        """Check that all processes of the default group train together."""
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
        """Wait for all ranks; return why no rank may go on, ``None`` if all may.

        Args:
            place: the point that this rank has reached.
            numbers: public numbers that must be the same on all ranks.
            refusal: why this rank refuses, if it does.
            asks: sets `asked` to ``True`` on all ranks.
        """
        if self.size == 1:
            self.asked = asks
            return refusal
        refusal = self._left or self._unreported or refusal
        self._unreported = None
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
        problem = self._joint_problem(refusal, numbers)
        self._given_up = problem
        return problem

    def _joint_problem(self, refusal: str | None, numbers: Sequence[float]) -> str:
        """Exchange the reasons, and return the one that this rank raises."""
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
            "The ranks differ in (noise_multiplier, max_grad_norm, batches in the step, checksum "
            f"of moving thresholds): {each}. Their clipped sums have different scales, and one "
            "rank's noise would be for one of them only. Change these numbers on all ranks alike, "
            "between the same two steps, and load a checkpoint on all ranks."
        )

    def refuse(self, reason: str) -> None:
        """Tell the other ranks that this one refuses.

        They hear of it at their next meeting. This rank waits for them here, since its process may
        end before its own next meeting. Inside a pass in which the others wait for this rank, it
        keeps the reason for the meeting after the pass.
        """
        if self.size == 1 or self._given_up is not None:
            return
        if self.in_pass:
            self._unreported = self._unreported or reason
        else:
            self.meet(Place.STEP, refusal=reason)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Do what the ranks have agreed on; after an error, refuse at all meetings from now on.

        The others may have taken a step that this rank lacks.
        """
        try:
            yield
        except BaseException as error:
            self.leave(f"{type(error).__name__}: {error}")
            raise

    def leave(self, reason: str) -> None:
        """Refuse at all meetings from now on.

        Args:
            reason: what this rank's step has met with.
        """
        self._left = (
            f"{reason}. It came after the ranks had agreed on a step, which the others may have "
            "taken, so this rank no longer has their parameters and their accountant's steps. "
            "Start all ranks again, from a checkpoint if you like."
        )

    @property
    def given_up(self) -> str | None:
        """Return why the ranks have given up the current logical batch, ``None`` if they have not.

        The rest of it on this rank must not be added to the other ranks' next batch.
        """
        return self._given_up

    def begin_batch(self) -> None:
        """Begin a logical batch: the one before has ended."""
        self._given_up = None

    # Before training

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise an error on all ranks if the body raises one on any rank.

        The body must not wait for other ranks.

        Raises:
            CoverageError: the body has raised one on another rank.
            ValueError: the body has raised another error on another rank.
            Exception: the error that the body has raised on this rank.
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
        report = error and (isinstance(error, CoverageError), f"{type(error).__name__}: {error}")
        dist.all_gather_object(reports, report, group=self._group)
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
        """Check that settings are the same on all ranks.

        Args:
            settings: this rank's settings by name.
            why: what goes wrong if they differ, and the remedy; the end of the message.
            known_only: compare a setting only between the ranks that have it.

        Raises:
            ValueError: they differ between ranks.
        """
        if self.size == 1:
            return
        reports: list[Any] = [None] * self.size
        dist.all_gather_object(reports, settings, group=self._group)
        # All ranks go through all names, so that all of them raise or none does.
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
        """Check that named tensors are the same on all ranks, by sums over their values.

        Raises:
            ValueError: they differ between ranks.
        """
        if self.size > 1:
            sums = {n: x.detach().double().nan_to_num().flatten() for n, x in tensors.items()}
            self.require_equal({n: (float(x.sum()), float(x.abs().sum())) for n, x in sums.items()})

    def first(self, value: Any) -> Any:
        """Return rank 0's value. All ranks must call this."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self._group)
        return values[0]

    def seed_of_rank(self, generator: torch.Generator | None, purpose: Purpose) -> int:
        """Return a seed that no other rank has, drawn from rank 0's ``generator``."""
        device = "cpu" if generator is None else generator.device
        drawn = torch.randint(2**62, (), generator=generator, device=device).cpu()
        dist.broadcast(drawn, 0, group=self._group)
        return seed_of(int(drawn), self.rank, purpose)
