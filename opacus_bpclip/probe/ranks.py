"""When a model is tried out that several ranks train, and the passes that they owe each other.

With sharded parameters every pass waits for all ranks, in trials, too. So ranks meet before each:
what one of them has to try all of them gather the parameters for, and those whose own batch is at
its end pass nothing through the model while others have parts of theirs left.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from opacus_bpclip.guard.guard import GradientGuard
from opacus_bpclip.guard.ranks import Place
from opacus_bpclip.model.plan import Plan
from opacus_bpclip.model.sharding import unsharded
from opacus_bpclip.probe.batches import Batch
from opacus_bpclip.probe.leaves import batch_leaves
from opacus_bpclip.probe.prober import Prober
from opacus_bpclip.probe.problems import Problem, UntriedError


class TrialsOfRanks:
    """Tries one model out on the batches of all ranks.

    Args:
        model: the model.
        guard: watches it.

    Attributes:
        untried: why the latest batch could not be tried, ``None`` if it was.
    """

    def __init__(self, model: nn.Module, guard: GradientGuard) -> None:
        self._model, self._guard = model, guard
        self.untried: str | None = None
        self._latest: Batch | None = None

    def plan_of(self, batch: Batch, prober: Prober) -> Plan:
        """Return what trials have shown of calls like this; try the model out if there were none.

        Args:
            batch: of the call.
            prober: searches the model.

        Raises:
            PrivacyViolationError: examples are coupled, or another rank refuses.
        """
        ranks, self.untried = self._guard.ranks, None
        if ranks.sharded and not self._guard.idle:
            self._latest = batch.hollow()
            asks = not prober.knows(batch)
            self._guard.require(ranks.meet(Place.FORWARD, asks=asks))
        tried: Problem | Plan = Plan({})
        with unsharded(self._model) if ranks.asked else nullcontext():
            try:
                tried = prober.on_batch(batch)
            except UntriedError as error:
                # The forward pass itself may tell better what is wrong with the batch.
                self.untried = str(error)
        problem = tried.text if isinstance(tried, Problem) else None
        if ranks.asked:
            problem = ranks.meet(Place.FORWARD, refusal=problem or self.untried)
        self._guard.require(problem)
        assert isinstance(tried, Plan)
        return tried

    @property
    def nothing_passed(self) -> str | None:
        """Say that this rank could take no part in another rank's pass."""
        ranks = self._guard.ranks
        if self._latest is not None or not ranks.sharded or ranks.size == 1:
            return None
        return (
            f"Rank {ranks.rank} of {ranks.size} takes a step and has passed nothing through the "
            "model yet: other ranks' passes wait for the shards that it has, and it has not seen "
            "how the model is called. Pass each local batch through the model, forward and "
            "backward, also one without rows."
        )

    def pass_without_examples(self) -> None:
        """Take part in a pass of other ranks; nothing is collected."""
        assert self._latest is not None
        self._guard.clear()
        self._guard.idle = True
        try:
            with torch.enable_grad():
                output = self._model(*self._latest.args, **self._latest.kwargs)
                made = [x for x in batch_leaves(output) if isinstance(x, Tensor)]
                torch.autograd.backward([x.sum() for x in made if x.requires_grad])
        finally:
            self._guard.idle = False
            self._guard.clear()
