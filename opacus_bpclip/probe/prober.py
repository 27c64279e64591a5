"""When a model is tried out: before training on made-up examples, or else on its first batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from opacus_bpclip.config import BackpropClipping
from opacus_bpclip.model.coverage import trainable_layers
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.model.plan import Plan
from opacus_bpclip.probe import problems, ragged
from opacus_bpclip.probe.batches import EXAMPLES, Batch
from opacus_bpclip.probe.copies import Copy, device_of
from opacus_bpclip.probe.coupling import try_model
from opacus_bpclip.probe.forms import made_up_batches
from opacus_bpclip.probe.functions import is_followed, needs_plan
from opacus_bpclip.probe.problems import Problem, UntriedError, first_line
from opacus_bpclip.probe.progress import shown
from opacus_bpclip.probe.randomness import Steady


class Prober:
    """Searches one model for coupled examples, once for each way of calling it.

    Args:
        model: the model.
        loss_reduction: ``"mean"`` or ``"sum"``.
        layers: the trainable layers, by name.
        ordered: whether their rows must be in the batch's order, as with a joint budget.
        search: whether to look for coupled examples at all.

    Attributes:
        passed: the ways of calling the model that need no further search, each with what was found
            of the functions that the model calls on parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_reduction: str,
        layers: Mapping[str, Layer] | None = None,
        ordered: bool = False,
        search: bool = True,
    ) -> None:
        self.model = model
        self.layers = layers or {}
        self.ordered, self.search = ordered, search
        self.loss_reduction = loss_reduction
        self.passed: dict[object, Plan] = {}

    def before_training(
        self, loader: object, *, batch_first: bool, loss_outside: bool = False
    ) -> Problem | None:
        """Return what couples made-up examples of the shapes that a data loader has.

        Where they cannot be made up, or do not fit the model, nothing is found: the first batch
        shows how the model is really called.

        Args:
            loader: the data loader.
            batch_first: whether the batch is the first axis, or the second.
            loss_outside: whether the loss is computed outside the model. Then it is not called with
                labels, though the loader has some, and a loss of its own counts only if it returns
                one in every form of call.
        """
        found = None
        for batch in made_up_batches(loader, self.model, batch_first=batch_first):
            try:
                problem = self._search_made_up(batch)
            except UntriedError:
                continue
            if problem is None or not (loss_outside and problem.of_loss):
                return problem
            found = problem
        return found

    def on_batch(self, batch: Batch) -> Problem | Plan:
        """Return what couples examples when the model is called like this, or else the plan.

        Made-up values are tried first. The batch's own are looked at only if those do not fit, and
        only for whether they influence each other.

        Raises:
            UntriedError: neither can be tried; the message is for the user.
        """
        key, known = self._key(batch), self._known(batch)
        if known is not None:
            return known
        try:
            return self._search_made_up(batch.invent(EXAMPLES)) or self.passed[key]
        except UntriedError:
            pass
        batch = batch.without_padding()
        if batch.size < 2:
            return Plan({})  # No companions; a later batch will have some.
        # Sorted examples do not show where they come in that order.
        turned = [batch.select(range(batch.size)[::-1])] if self.ordered else []
        try:
            return self._search(batch, *turned) or self.passed[key]
        except UntriedError as error:
            if not self.search and not needs_plan(self.layers):
                return Plan({})
            order = ("first", "second")[batch.axis]
            raise UntriedError(problems.untried(str(error), order)) from None

    def knows(self, batch: Batch) -> bool:
        """Return whether `on_batch` would not run the model."""
        return self._known(batch) is not None

    def _search_made_up(self, batch: Batch) -> Problem | None:
        """Search one made-up batch; where the model takes no lengths of 0, one of longer ones."""
        try:
            return self._search(batch)
        except UntriedError:
            accelerated = device_of(self.model).type != "cpu"
            counted = ragged.counted(batch, self.model, accelerated=accelerated)
            if counted is None or not self.ordered:
                raise
            return self._search(counted)

    def _search(self, *batches: Batch) -> Problem | None:
        plans = []
        # Of another length: where the batch is, is to be seen anew; the rest has been searched.
        search = self.search and self._key(batches[0]) not in self.passed
        for batch in batches:
            with shown():
                problem, plan = try_model(
                    self.model,
                    batch,
                    loss_reduction=self.loss_reduction,
                    layers=self.layers,
                    ordered=self.ordered,
                    search=search,
                )
            if problem is not None:
                return problem
            plans.append(plan)
        self.passed[self._key(batches[0])] = plans[0]
        self.passed[self._key(batches[0]), batches[0].shapes] = plans[0]
        return None

    def _known(self, batch: Batch) -> Plan | None:
        """Return what was found of such a batch; where examples are folded, of the same lengths."""
        plan = self.passed.get(self._key(batch))
        if plan is None or not plan.is_folded:
            return plan
        return self.passed.get((self._key(batch), batch.shapes))

    def _key(self, batch: Batch) -> object:
        return self.model.training, batch.signature


def count_uses(model: nn.Module, batch: Batch, plan: Plan | None = None) -> dict[str, int]:
    """Return how often one forward pass over a batch uses each trainable layer.

    A layer inside a recurrent network counts as the network's runs do: time steps are positions.
    So do all functions together that a model calls on a layer's parameters. A layer that this batch
    does not reach counts once.

    Args:
        model: the model.
        batch: what it is run on.
        plan: what trial runs have shown of the functions.

    Raises:
        UntriedError: the model does not run on this batch.
    """
    reason = ""
    for double in (True, False):
        if double and not Copy.fits(model):
            continue
        try:
            with Copy(model, double=double) as copy:
                run = copy.run(batch, Steady())
        except Exception as error:  # whatever the model's own code raises
            reason = first_line(error)
            continue
        calls = Counter(call.name for call in run.calls)
        names = {module: name for name, module in model.named_modules()}
        found = {}
        for name, layer in trainable_layers(model).items():
            own = calls[name if layer.recurrence is None else names[layer.recurrence]]
            if is_followed(layer) or (plan is not None and name in plan.passed_by):
                own = 0
            found[name] = max(1, own + (plan is not None and name in plan.layers))
        return found
    raise UntriedError(reason)


def with_uses(
    config: BackpropClipping,
    model: nn.Module,
    loader: object,
    *,
    batch_first: bool = True,
    plan: Plan | None = None,
) -> BackpropClipping:
    """Return the options with ``uses="auto"`` replaced by what a dry run on made-up examples finds.

    What is found depends on the model and the shapes of the loader's examples alone: it is public.
    A count on real examples would not be. Where nothing can be found, a layer is used once, and
    more is refused when it happens. A joint budget needs no count.
    """
    if config.uses != "auto" or config.allocation == "joint":
        return config
    for batch in made_up_batches(loader, model, batch_first=batch_first):
        try:
            return replace(config, uses=count_uses(model, batch, plan))
        except UntriedError:
            continue
    return config
