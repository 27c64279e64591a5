"""Trial runs of a model that several ranks train, and passes that a rank runs for the others.

With sharded parameters every pass of one rank waits for all ranks, in trial runs, too. So the ranks
meet before each pass. If one of them must try the model, all gather the parameters. A rank whose
logical batch has ended runs passes without examples while others have physical batches left.
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
    """Tries one model on the batches of all ranks.

    Args:
        model: the model.
        guard: the model's guard.

    Attributes:
        untried: why the model could not be tried on the latest batch; ``None`` if it could.
    """

    def __init__(self, model: nn.Module, guard: GradientGuard) -> None:
        self._model, self._guard = model, guard
        self.untried: str | None = None
        self._latest: Batch | None = None

    def plan_of(self, batch: Batch, prober: Prober) -> Plan:
        """Return the plan for calls like this one, from trial runs if there is none yet.

        Args:
            batch: the batch of the call.
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
                # Keep the reason: the forward pass may raise a better error for this batch.
                self.untried = str(error)
        problem = tried.text if isinstance(tried, Problem) else None
        if ranks.asked:
            problem = ranks.meet(Place.FORWARD, refusal=problem or self.untried)
        self._guard.require(problem)
        assert isinstance(tried, Plan)
        return tried

    @property
    def nothing_passed(self) -> str | None:
        """Check that this rank can take part in passes of other ranks."""
        ranks = self._guard.ranks
        if self._latest is not None or not ranks.sharded or ranks.size == 1:
            return None
        return (
            f"Rank {ranks.rank} of {ranks.size} takes a step and has not run the model yet. Other "
            "ranks' passes wait for its shards of the parameters, but it does not know how the "
            "model is called. Run the model on each local batch, forward and backward, also on one "
            "without rows."
        )

    def pass_without_examples(self) -> None:
        """Take part in a pass of other ranks, without examples of its own."""
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
