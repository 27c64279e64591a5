"""When a model is tried: before training on made-up examples, or else on its first batch."""

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
from opacus_bpclip.probe.padding import problem_of_padding
from opacus_bpclip.probe.problems import Problem, UntriedError, first_line
from opacus_bpclip.probe.progress import shown
from opacus_bpclip.probe.randomness import Steady


class Prober:
    """Searches one model for coupled examples, once for each way of calling it.

    Args:
        model: the model.
        loss_reduction: ``"mean"`` or ``"sum"``.
        layers: the trainable layers, by name.
        ordered: whether their rows must be in the batch's order, which a joint budget needs.
        search: whether to search for coupled examples.

    Attributes:
        passed: the ways of calling the model that need no further search, each with the plan of
            the functions on parameters.
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

        Where examples cannot be made up, or the model does not run on them, nothing is found; the
        model is then tried on its first batch.

        Args:
            loader: the data loader.
            batch_first: whether the batch axis is the first one, or the second.
            loss_outside: whether the loss is computed outside the model. The model is then not
                called with the loader's labels, so a problem of a loss that the model returns
                counts only if it returns one in every way of calling it.
        """
        found = None
        for batch in made_up_batches(loader, self.model, batch_first=batch_first):
            try:
                problem = self._search_made_up(batch)
            except UntriedError:
                continue
            if problem is None and self.search:
                with shown():
                    problem = problem_of_padding(loader, self.model, batch_first=batch_first)
            if problem is None or not (loss_outside and problem.of_loss):
                return problem
            found = problem
        return found

    def on_batch(self, batch: Batch) -> Problem | Plan:
        """Return what couples the examples of a call like this one, or the plan if nothing does.

        Made-up values are tried first. The batch's own values are used only if the model does not
        run on those, and only to see whether the examples influence each other.

        Raises:
            UntriedError: the model runs on neither; the message is for the user.
        """
        key, known = self._key(batch), self._known(batch)
        if known is not None:
            return known
        try:
            return self._search_made_up(batch.invent(EXAMPLES)) or self.passed[key]
        except UntriedError:
            pass
        square = batch.square
        batch = batch.without_padding()
        if batch.size < 2:
            return Plan({})  # A later batch will have several examples.
        # Sorting changes nothing if the batch is sorted already: try it reversed, too.
        turned = [batch.select(range(batch.size)[::-1])] if self.ordered else []
        try:
            return self._search(batch, *turned) or self.passed[key]
        except UntriedError as error:
            if not self.search and not needs_plan(self.layers):
                return Plan({})
            order = ("first", "second")[batch.axis]
            raise UntriedError(problems.untried(str(error), order, square)) from None

    def knows(self, batch: Batch) -> bool:
        """Return whether `on_batch` has an answer for such a batch without trial runs."""
        return self._known(batch) is not None

    def _search_made_up(self, batch: Batch) -> Problem | None:
        """Search a made-up batch; if the model refuses lengths of 0, one with lengths 1 and 2."""
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
        # A batch of other lengths needs a new plan, but no second search.
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
        """Return the plan for such a batch; with folded examples, for the same shapes only."""
        plan = self.passed.get(self._key(batch))
        if plan is None or not plan.is_folded:
            return plan
        return self.passed.get((self._key(batch), batch.shapes))

    def _key(self, batch: Batch) -> object:
        # What a part of the model keeps in training mode does not show in evaluation mode.
        return tuple(module.training for module in self.model.modules()), batch.signature


def count_uses(model: nn.Module, batch: Batch, plan: Plan | None = None) -> dict[str, int]:
    """Return how often one forward pass over a batch uses each trainable layer.

    A layer inside a recurrent network has one use for each call of the network, since time steps
    are positions. All functions on a layer's parameters together are one use. A layer that this
    batch does not reach counts as one use.

    Args:
        model: the model.
        batch: the batch to run on.
        plan: the plan of the functions on parameters.

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
    """Return the options with ``uses="auto"`` replaced by the counts of a run on made-up examples.

    The counts depend only on the model and the shapes of the loader's examples, which are public.
    Counts on real examples would be private. If the model cannot be run, each layer counts as one
    use, and further uses are refused in training. A joint budget needs no counts.
    """
    if config.uses != "auto" or config.allocation == "joint":
        return config
    for batch in made_up_batches(loader, model, batch_first=batch_first):
        try:
            return replace(config, uses=count_uses(model, batch, plan))
        except UntriedError:
            continue
    return config
