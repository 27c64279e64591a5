"""Search for examples that influence each other inside a model.

An example's output must not depend on the other examples of its batch (its companions). The search
runs the model on a batch, on parts of it, and on the batch with other companions, and compares row
by row. It is not a proof; ``docs/guarantee.md`` says what it finds and what it may miss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from opacus_bpclip.model.layer import Layer
from opacus_bpclip.model.plan import Plan
from opacus_bpclip.probe import ragged
from opacus_bpclip.probe.batches import EXAMPLES, Batch
from opacus_bpclip.probe.comparison import partitions
from opacus_bpclip.probe.copies import Copy
from opacus_bpclip.probe.functions import is_followed, make_plan
from opacus_bpclip.probe.leaves import batch_leaves
from opacus_bpclip.probe.order import Rows, rows_of_layers
from opacus_bpclip.probe.problems import Problem, RefusedError, UntriedError, first_line
from opacus_bpclip.probe.randomness import Steady
from opacus_bpclip.probe.recording import ChangedLaterError, Recording
from opacus_bpclip.probe.search import Search, same
from opacus_bpclip.probe.state import problem_of_state


def find_coupling(
    model: nn.Module, batch: Batch, *, loss_reduction: str, layers: Iterable[Layer] = ()
) -> Problem | None:
    """Return what couples the examples of a batch, with the remedy; ``None`` if nothing is found.

    The model's parameters, buffers and training flags, and the random number generators, are left
    as they were.

    Args:
        model: the model, with or without clipping attached.
        batch: two or more examples. The first four are used, as they are, and with integers and
            flags changed to those of padding and of ignored labels.
        loss_reduction: ``"mean"`` or ``"sum"``: an output without a batch axis, such as a loss that
            the model computes, must be this over the examples.
        layers: the layers whose rows must be in the batch's order, which a joint budget needs.

    Raises:
        UntriedError: the model does not run on this batch or on parts of it.
    """
    by_name = {layer.name: layer for layer in layers}
    problem, _ = try_model(
        model, batch, loss_reduction=loss_reduction, layers=by_name, ordered=bool(by_name)
    )
    return problem


def try_model(
    model: nn.Module,
    batch: Batch,
    *,
    loss_reduction: str,
    layers: Mapping[str, Layer],
    ordered: bool,
    search: bool = True,
) -> tuple[Problem | None, Plan]:
    """Return what couples the examples of a batch, and the plan of the functions on parameters.

    Args:
        model: the model, with or without clipping attached.
        batch: two or more examples, of which the first four are used.
        loss_reduction: ``"mean"`` or ``"sum"``: what an output without a batch axis must be.
        layers: the trainable layers, by name.
        ordered: whether the layers' rows must be in the batch's order.
        search: whether to search for coupled examples; the plan is made in any case.

    Raises:
        UntriedError: the model does not run on this batch or on parts of it.
    """
    if not any(map(batch.holds_examples, batch_leaves((batch.args, batch.kwargs)))):
        raise UntriedError("none of its arguments has a row for each example")
    reason = ""
    batch = batch.select(range(min(batch.size, EXAMPLES)))
    for double in (True, False):
        if double and not Copy.fits(model):
            continue
        try:
            problem, plan = _planned(model, batch, layers, double=double)
            if search:
                rule_holds = [
                    layer
                    for layer in layers.values()
                    if layer.name not in plan.passed_by and not is_followed(layer)
                ]
                # A rule for several rows of each example needs to know which they are.
                to_order = [own for own in rule_holds if ordered or own.arguments.place.entries > 1]
                rows = {} if problem else rows_of_layers(model, to_order)
                found = _searched(model, batch, loss_reduction, rows, double=double)
                problem = found or problem
            return problem, plan
        except Exception as error:  # whatever the model's own code raises
            reason = first_line(error)
    raise UntriedError(reason)


def _planned(
    model: nn.Module, batch: Batch, layers: Mapping[str, Layer], *, double: bool
) -> tuple[Problem | None, Plan]:
    if not layers:
        return None, Plan({})
    try:
        with Copy(model, double=double) as copy:
            return None, make_plan(copy, batch, layers)
    except RefusedError as error:
        return error.problem, Plan({})


def _searched(
    model: nn.Module, batch: Batch, loss_reduction: str, rows: Rows, *, double: bool
) -> Problem | None:
    for copied in (False, True):
        try:
            with Copy(model, double=double, copied=copied) as copy:
                return (
                    Search(copy, batch, loss_reduction, rows).problem()
                    or problem_of_state(copy, batch)
                    or _problem_when_ragged(copy, batch, loss_reduction, rows)
                    or _problem_when_sorted(copy, batch, rows)
                )
        except ChangedLaterError:
            continue
    raise AssertionError("copies do not change")


def _problem_when_sorted(copy: Copy, batch: Batch, rows: Rows) -> Problem | None:
    """Return which layer has its rows in another order when examples have several lengths."""
    accelerated = copy.device.type != "cpu"
    variants = ragged.of_several_lengths(batch, copy.model, accelerated=accelerated)
    for variant in variants if rows else ():
        try:
            problem = Search(copy, variant, "mean", rows).problem_of_order()
        except ChangedLaterError:
            raise
        except Exception:  # whatever the model's own code raises
            continue
        if problem is not None:
            return problem
    return None


def _problem_when_ragged(
    copy: Copy, batch: Batch, loss_reduction: str, layers: Rows
) -> Problem | None:
    """Return what is wrong when different numbers of the examples' positions count.

    A variant that the model does not run on is left out: the model cannot be trained on it either.
    """
    start = ragged.padded(batch)
    if start is None:
        return None
    problem = _problem_of_numbers(copy, start, loss_reduction, layers)
    accelerated = copy.device.type != "cpu"
    _, rows = next(partitions(batch.size))
    with ragged.IgnoredIndices() as losses:
        plain = _run(copy, start.select(rows))
    possible = ragged.possible_labels(
        copy.model, start, accelerated=accelerated, known=sorted(losses.values)
    )
    for labels in possible:
        known = [plain]
        for value in labels.values:
            if problem is not None:
                return problem
            variant = ragged.ignoring(start, labels.leaf, value)
            with ragged.NegativeIndices(value) if accelerated else nullcontext():
                run = _run(copy, variant.select(rows))
                # A run with the same numbers as a known one would find nothing new.
                if run is not None and not any(other and same(run, other) for other in known):
                    known.append(run)
                    problem = _problem_of_numbers(copy, variant, loss_reduction)
    return problem


def _problem_of_numbers(
    copy: Copy, batch: Batch, loss_reduction: str, rows: Rows | None = None
) -> Problem | None:
    variants: list[tuple[AbstractContextManager[None], Rows]] = [(nullcontext(), rows or {})]
    if copy.dtype is not None:
        # In single precision larger parameters would also make rounding errors too large.
        variants.append((copy.spread(), {}))
    for spread, ordered in variants:
        try:
            with spread:
                problem = Search(copy, batch, loss_reduction, ordered).problem_of_numbers()
        except ChangedLaterError:
            raise
        except Exception:  # whatever the model's own code raises
            problem = None
        if problem is not None:
            return problem
    return None


def _run(copy: Copy, batch: Batch) -> Recording | None:
    try:
        return copy.run(batch, Steady(), inside=False)
    except Exception:  # whatever the model's own code raises
        return None
