"""What the log of samples holds: passes over the loader, their samples, and physical batches."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class Pass:
    """One pass over the loader.

    Attributes:
        alive: whether the sampler may still draw.
        left: whether the user's loop ended it before its last batch.
        read: whether the user's loop goes on, which worker processes draw ahead of; ``None`` if
            unknown.
        used: how many steps or physical batches have trained on its samples.
        ahead: how many physical batches were announced before the first step of the pass.
        part: the sample of which more physical batches will be announced.
        beside: the earlier passes that were not over when it began.
        is_abandoned: whether it was unknown which of two passes a step was of, this or the other:
            no later step may be of either.
    """

    alive: bool = True
    left: bool = False
    read: bool | None = None
    used: int = 0
    ahead: int = 0
    part: Sample | None = None
    beside: list[Pass] = field(default_factory=list)
    is_abandoned: bool = False

    @property
    def is_over(self) -> bool:
        """Return whether nothing that it drew is still to come."""
        return not self.alive and not self.read

    @property
    def is_owed_steps(self) -> bool:
        """Return whether each of its physical batches must have had a step when it is over."""
        return not self.left and not self.is_abandoned


@dataclass(eq=False)
class Sample:
    """One batch that the sampler drew.

    Attributes:
        items: the number of items.
        of: the pass over the loader that drew it.
        rows: how many of its rows the current step has trained on.
        announced: whether a physical batch of it was announced.
    """

    items: int
    of: Pass
    rows: int = 0
    announced: bool = False


@dataclass(eq=False)
class Signal:
    """The announcement of one physical batch.

    Attributes:
        skip: whether more physical batches of its logical batch follow.
        sample: the sample that it is a part of; ``None`` without a private loader.
        thread: the thread that announced it.
    """

    skip: bool
    sample: Sample | None
    thread: int

    @property
    def is_empty(self) -> bool:
        """Return whether its sample has no items."""
        return self.sample is not None and not self.sample.items
