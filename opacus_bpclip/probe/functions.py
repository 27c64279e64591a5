"""Trial runs that find where functions on parameters have the batch: the plan of a model.

Two runs on batches of two sizes show which arguments and results grow with the batch. Runs on the
same examples with different companions show where each example's rows are. At last every function
is run on one example at a time: its result and gradient must be the same as in the batch
(`verified`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opacus_bpclip.model.function_checks import shared_argument
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.model.plan import CallKey, Plan, Template
from opacus_bpclip.model.recurrence import is_packed
from opacus_bpclip.probe import problems, ragged
from opacus_bpclip.probe.batches import Batch
from opacus_bpclip.probe.comparison import Companions, partitions
from opacus_bpclip.probe.copies import Copy
from opacus_bpclip.probe.leaves import batch_leaves
from opacus_bpclip.probe.order_of_functions import (
    Changes,
    Places,
    check_copies,
    check_replayed,
    in_order,
    narrow,
    pairs_problem,
)
from opacus_bpclip.probe.problems import Problem, RefusedError
from opacus_bpclip.probe.randomness import SEEDS
from opacus_bpclip.probe.recorder import Recorder, Trials
from opacus_bpclip.probe.shapes import LayerCall, PairsError, Sizes, aligned, places_of
from opacus_bpclip.probe.touched import first_look
from opacus_bpclip.probe.verified import verified
from opacus_bpclip.rules import FunctionRule


def make_plan(copy: Copy, batch: Batch, layers: Mapping[str, Layer]) -> Plan:
    """Make the plan for calls like this one: where functions on parameters have the batch.

    Args:
        copy: a copy of the model, inside its ``with`` statement.
        batch: two or more examples.
        layers: the trainable layers.

    Raises:
        RefusedError: the gradients of a function cannot be bounded.
        Exception: whatever the model's own code raises.
    """
    plan = _plan_of(Trials(copy, batch, layers))
    if not plan.templates:
        return plan
    if plan.is_folded and any(map(is_packed, batch_leaves((batch.args, batch.kwargs)))):
        raise RefusedError(Problem("(root)", problems.packed_functions()))
    _check_order(Trials(copy, batch, layers), plan)
    # Some models call other functions if a mask hides nothing: run them on masks of ones, too.
    half = next(partitions(batch.size))[0]
    for variant in _whole(batch):
        try:
            trials = Trials(copy, variant, layers)
            if trials.replay(plan, variant.select(half)).unknown:
                plan = plan.joined(_plan_of(trials))
        except Exception:
            continue
    return plan


def _check_order(trials: Trials, plan: Plan) -> None:
    """Check that examples keep their places with other companions, random numbers and lengths.

    Raises:
        RefusedError: they do not.
    """
    batch, size = trials.batch, trials.batch.size
    _check_companions(trials, plan, None)
    for seed in SEEDS if trials.steady.random else ():
        _check_companions(trials, plan, seed)
    part = next(partitions(size))[0]
    among = Companions(size, len(part), part, range(len(part)))
    copy, padded = trials.copy, ragged.padded(batch)
    accelerated = copy.device.type != "cpu"
    variants = ragged.of_several_lengths(batch, copy.model, accelerated=accelerated)
    for variant in (*variants, *(() if padded is None else (padded,))):
        # Sorting by length changes nothing if the batch is sorted already: try it reversed, too.
        for turned in (variant, variant.select(range(size)[::-1])):
            try:
                runs = trials.replay(plan, turned), trials.replay(plan, turned.select(part))
            except Exception:  # the model does not run on such values: it is not trained on them
                break
            check_replayed(*runs, among, trials.tolerance)
            check_copies(runs[0], turned, trials.tolerance, _again(trials, plan, turned, None))


def _check_companions(trials: Trials, plan: Plan, seed: int | None) -> None:
    batch, size = trials.batch, trials.batch.size
    base = trials.replay(plan, batch, seed=seed)
    for kept, _ in partitions(size):
        run = trials.replay(plan, batch.swapped(kept, seed=2), seed=seed)
        check_replayed(base, run, Companions(size, size, kept, kept), trials.tolerance)
    if seed is not None:
        check_copies(base, batch, trials.tolerance, _again(trials, plan, batch, seed))


def _again(
    trials: Trials, plan: Plan, batch: Batch, seed: int | None
) -> Callable[[Changes], Sequence[Tensor]]:
    return lambda changes: trials.replay(plan, batch, seed=seed, changes=changes).outputs


def _whole(batch: Batch) -> Iterator[Batch]:
    """Yield the batch with ones in the place of each leaf of integers or flags."""
    for leaf in batch_leaves((batch.args, batch.kwargs)):
        if batch.holds_examples(leaf) and isinstance(leaf, Tensor) and not leaf.is_floating_point():

            def ones(other: Any, chosen: Tensor = leaf) -> Any:
                return torch.ones_like(other) if other is chosen else other

            yield batch.map(ones)


def _plan_of(trials: Trials) -> Plan:
    """Return the plan for one batch."""
    batch, layers = trials.batch, trials.layers
    rows = next(partitions(batch.size))[0]
    among = Companions(batch.size, len(rows), rows, range(len(rows)))
    if _is_left_to_rules(trials, rows, among):
        return Plan({})
    functions, calls = trials.sizes(batch)
    fewer, fewer_calls = trials.sizes(batch.select(rows))
    if not aligned(functions, fewer):
        # The first run may have filled caches: run again.
        functions, calls = trials.sizes(batch)
        fewer, fewer_calls = trials.sizes(batch.select(rows))
    tolerance = trials.tolerance
    passed_by = _passed_by(layers, calls, fewer_calls, among)
    needed = passed_by or needs_plan(layers)
    if not aligned(functions, fewer):
        if not needed:
            return Plan({})
        raise RefusedError(Problem("(root)", problems.unsteady_functions()))
    following = [
        _following(sizes, less, among) for sizes, less in zip(functions, fewer, strict=True)
    ]
    # Sizes that grow with the batch, but not in proportion, are refused in functions on parameters.
    meets = [where is None or any(where[0]) or any(where[1]) for where in following]
    recorder, outputs = _recorded(trials, meets, passed_by)
    seen = recorder.seen
    if not seen:
        return Plan({})
    found: dict[int, Places] = {}
    for number, one in seen.items():
        places = following[number]
        grows = places is None or any(places[0][index] for index in one.call.made)
        if places is None or grows or (one.call.is_in_place and 0 in one.call.made):
            raise RefusedError(pairs_problem(one))
        found[number] = [list(where) for where in (*places[0], *places[1])]
    # One part of each pair is enough: together they tell all examples apart.
    for part, _ in partitions(batch.size):
        other, _ = trials.record(batch.select(part), meets, passed_by)
        where = Companions(batch.size, len(part), part, range(len(part)))
        narrow(seen, other.seen, found, where, tolerance)
    templates = in_order(
        seen,
        found,
        batch,
        outputs,
        tolerance,
        lambda changes: trials.record(batch, meets, passed_by, changes)[1],
    )
    plan: dict[CallKey, list[Template]] = {}
    for number in sorted((*seen, *recorder.derived)):
        if number in recorder.derived:
            plan.setdefault(recorder.derived[number], []).append(Template((), ()))
            continue
        one = seen[number]
        template, problem = verified(one, templates[number], batch.size, tolerance)
        if problem is not None:
            raise RefusedError(problem)
        plan.setdefault(one.call.key, []).append(template)
    names = frozenset[str]().union(*(one.call.names for one in seen.values()))
    met = frozenset(name.rpartition(".")[0] for name in names)
    return Plan(
        {key: tuple(each[:1] if len(set(each)) == 1 else each) for key, each in plan.items()},
        met,
        # For other layers in passed_by the layer's rule says what is wrong.
        met & passed_by,
    )


def _is_left_to_rules(trials: Trials, rows: Sequence[int], among: Companions) -> bool:
    """Return whether every parameter is used by a layer with a rule, called as its rule says."""
    if needs_plan(trials.layers):
        return False
    touched, calls = first_look(trials, trials.batch)
    if touched:
        return False
    touched, fewer = first_look(trials, trials.batch.select(rows))
    try:
        return not (touched or _passed_by(trials.layers, calls, fewer, among))
    except RefusedError:
        return False  # The first run may have filled caches: later runs decide.


def _recorded(
    trials: Trials, meets: Sequence[bool], passed_by: set[str]
) -> tuple[Recorder, list[Tensor]]:
    """Record a run. Layers that get arguments without examples are left to their rules.

    Args:
        trials: runs the model.
        meets: for each call, by its number, whether it has examples.
        passed_by: the layers whose functions are followed instead of using their rule; layers that
            are left to their rule are removed from it.

    Raises:
        RefusedError: a parameter without a rule has an argument without examples.
    """
    while True:
        recorder, outputs = trials.record(trials.batch, meets, passed_by)
        if not recorder.of_shared:
            return recorder, outputs
        left = set[str]()
        for call in recorder.of_shared:
            layers = {name.rpartition(".")[0] for name in call.names}
            if not layers <= passed_by:
                raise RefusedError(Problem("(root)", shared_argument(call)))
            left |= layers
        passed_by -= left


def _passed_by(
    layers: Mapping[str, Layer],
    calls: Sequence[LayerCall],
    fewer: Sequence[LayerCall],
    among: Companions,
) -> set[str]:
    """Return the layers whose inputs or outputs do not have the batch where their rule needs it.

    Raises:
        RefusedError: a layer's number of rows is not in proportion to the batch's size.
    """
    found = set()
    for name in dict.fromkeys(call.name for call in (*calls, *fewer)):
        layer = layers[name]
        if layer.recurrence is not None:
            continue
        sides = [[call for call in side if call.name == name] for side in (calls, fewer)]
        if len(sides[0]) != len(sides[1]):
            raise RefusedError(Problem(name, problems.routed(name)))
        for one, other in zip(*sides, strict=True):
            rows, less = _rows_of(layer, one), _rows_of(layer, other)
            if rows - {among.before} or less - {among.after}:
                found.add(name)
            grown = {size * among.after for size in rows - less}
            if grown != {size * among.before for size in less - rows}:
                raise RefusedError(Problem(name, problems.routed(name)))
    return found


def _rows_of(layer: Layer, call: LayerCall) -> set[int]:
    """Return the sizes of a call's inputs and output on the axis where the rule has the batch."""
    try:
        sizes = {*layer.rule.batch_sizes(layer.arguments.get(call.args, call.kwargs))}
    except Exception:  # the guard reports in training what is wrong with such a call
        return set()
    if isinstance(call.output, Tensor) and call.output.dim() > layer.arguments.batch_axis:
        sizes.add(layer.arguments.rows(call.output).shape[0])
    return sizes


def _following(one: Sizes, other: Sizes, among: Companions) -> tuple[Places, Places] | None:
    """Return where a call's arguments and results may have the batch; ``None`` for pairs."""
    try:
        return (
            [places_of(a, b, among) for a, b in zip(one.arguments, other.arguments, strict=True)],
            [places_of(a, b, among) for a, b in zip(one.results, other.results, strict=True)],
        )
    except PairsError:
        return None


def is_followed(layer: Layer) -> bool:
    """Return whether a layer has no rule, so that functions on its parameters are followed."""
    return isinstance(layer.rule, FunctionRule)


def needs_plan(layers: Mapping[str, Layer]) -> bool:
    """Return whether some layer has no rule, so that the model needs a plan."""
    return any(map(is_followed, layers.values()))
