"""Where functions that a model calls on parameters take up the batch, found by trial runs.

First two runs, on batches of two sizes, show what follows the batch's size. Then runs on the same
examples among different companions show where each example's rows are. In the end every function is
run on one example at a time, and must return the same and have the same gradient (`verified`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from opacus_bpclip.model.functions import CallKey, FunctionCall, ParameterFunctions, Plan, Template
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.model.places import Place
from opacus_bpclip.probe import problems
from opacus_bpclip.probe.batches import Batch
from opacus_bpclip.probe.comparison import Companions, close, partitions
from opacus_bpclip.probe.copies import Copy
from opacus_bpclip.probe.leaves import batch_leaves
from opacus_bpclip.probe.problems import Problem
from opacus_bpclip.probe.randomness import Steady, tolerated
from opacus_bpclip.probe.shapes import (
    LayerCall,
    PairsError,
    Sizes,
    SizesOfFunctions,
    aligned,
    places_of,
    watch_layers,
)
from opacus_bpclip.probe.verified import verified
from opacus_bpclip.rules import BroadcastRule, FunctionRule


class RefusedError(Exception):
    """A function takes up the batch in a way that cannot be bounded.

    Args:
        problem: what is wrong.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.text)
        self.problem = problem


@dataclass
class Seen:
    """A call of a function that met examples, in one run.

    Attributes:
        call: the call.
        arguments: what it was called on, the private graph's tensors included.
        results: its flattened results.
        random: whether it drew numbers.
    """

    call: FunctionCall
    arguments: list[Any]
    results: list[Any]
    random: bool


class Recorder(ParameterFunctions):
    """Writes down the calls that meet examples.

    Args:
        parameters: as for `ParameterFunctions`.
        meets: by the number of a call among all, whether it meets examples.
        steady: what holds random numbers still.

    Attributes:
        seen: the calls that meet examples, by their number.
        derived: by number, the keys of those that do not.
        disturbed: by number, how to change what calls return.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], meets: Sequence[bool], steady: Steady
    ) -> None:
        super().__init__(parameters)
        self.seen: dict[int, Seen] = {}
        self.derived: dict[int, CallKey] = {}
        self._meets_examples = meets
        self._steady = steady
        self._number = -1
        self.disturbed: Mapping[int, Any] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self._number += 1
        return super().__torch_function__(func, types, args, kwargs)

    def called(self, call: FunctionCall) -> Any:
        """Write down a call that meets examples, and return what it does."""
        if not self._meets_examples[self._number]:
            key, result = call.key, self.derive(call)
            if any(isinstance(x, Tensor) and x.requires_grad for x in pytree.tree_leaves(result)):
                self.derived[self._number] = key
            return result
        leaves = [_cut_off(leaf) for leaf in call.leaves]
        for index, made in call.made.items():
            leaves[index] = made.value
        random, self._steady.random = self._steady.random, False
        with torch.enable_grad():
            result = call.run(leaves)
        drawn, self._steady.random = self._steady.random, self._steady.random or random
        results = pytree.tree_leaves(result)
        if _depends(results, [made.value for made in call.made.values()]):
            self.seen[self._number] = Seen(call, leaves, results, drawn)
        change = self.disturbed.get(self._number)
        result = pytree.tree_map(
            lambda x: x.detach().clone() if isinstance(x, Tensor) else x,
            result if change is None else change(result),
        )
        if call.is_in_place:
            call.leaves[0].copy_(result)
            return call.leaves[0] if call.name != "__setitem__" else None
        return result


def _cut_off(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    own = leaf.detach()
    # As it is at the call: the model may work on it in place later.
    own = own.clone() if own.is_floating_point() or own.is_complex() else own
    return own.requires_grad_(own.is_floating_point() or own.is_complex())


def _depends(results: Iterable[Any], values: Sequence[Tensor]) -> bool:
    """Return whether a gradient flows from results to what was made from parameters."""
    outs = [x for x in results if isinstance(x, Tensor) and x.requires_grad]
    if not outs:
        return False
    found = torch.autograd.grad(
        outs, values, [torch.ones_like(x) for x in outs], retain_graph=True, allow_unused=True
    )
    return any(gradient is not None for gradient in found)


@dataclass
class _Trials:
    """Runs of one copy of a model."""

    copy: Copy
    batch: Batch
    layers: Mapping[str, Layer]
    steady: Steady = field(default_factory=Steady)

    def modules(self) -> dict[str, nn.Module]:
        """Return the layers that have a rule of their own, by name, without those that copy."""
        return {
            name: layer.module
            for name, layer in self.layers.items()
            if not isinstance(layer.rule, (FunctionRule, BroadcastRule))
        }

    def parameters(self, copied: Iterable[str]) -> dict[str, nn.Parameter]:
        """Return what stands for the trainable parameters, by the layer's name and theirs."""
        return {
            f"{name}.{own}": self.copy.of(parameter)
            for name, layer in self.layers.items()
            if name not in copied
            for own, parameter in layer.named_parameters.items()
        }

    def sizes(self, batch: Batch) -> tuple[list[Sizes], list[LayerCall]]:
        """Run the model; return the sizes in the calls of functions, and the calls of layers."""
        mode, calls = SizesOfFunctions(), list[LayerCall]()
        with ExitStack() as stack:
            for handle in watch_layers(self.modules(), calls):
                stack.callback(handle.remove)
            self.copy.run(batch, self.steady, inside=False, mode=mode, plain=True)
        return mode.calls, calls

    def record(
        self,
        batch: Batch,
        meets: Sequence[bool],
        passed_by: Iterable[str],
        disturbed: Mapping[int, Any] | None = None,
    ) -> tuple[Recorder, list[Tensor]]:
        """Run the model; return what was written down, and what the model returned."""
        copied = [n for n, layer in self.layers.items() if isinstance(layer.rule, BroadcastRule)]
        mode = Recorder(self.parameters(copied), meets, self.steady)
        mode.disturbed = disturbed or {}
        with ExitStack() as stack:
            for name, module in self.modules().items():
                if name not in passed_by:
                    for handle in _pausing(module, mode):
                        stack.callback(handle.remove)
            run = self.copy.run(batch, self.steady, inside=False, mode=mode, plain=True)
        return mode, run.outputs


def _pausing(
    module: nn.Module, mode: ParameterFunctions
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    def pause(*_: Any) -> None:
        mode.paused = True

    def resume(*_: Any) -> None:
        mode.paused = False

    yield module.register_forward_pre_hook(pause)
    yield module.register_forward_hook(resume, always_call=True)


def make_plan(copy: Copy, batch: Batch, layers: Mapping[str, Layer]) -> Plan:
    """Find out how functions take up the batch when the model is called like this.

    Args:
        copy: of the model, entered.
        batch: two or more examples.
        layers: the trainable layers.

    Raises:
        RefusedError: in a way that cannot be bounded.
        Exception: whatever the model's own code raises.
    """
    trials = _Trials(copy, batch, layers)
    plan, functions = _plan_of(trials)
    if not plan.templates:
        return plan
    # Some models look whether a mask hides anything at all, and call other functions if not.
    for variant in _whole(batch):
        try:
            others, _ = trials.sizes(variant)
            if not aligned(functions, others):
                other, _ = _plan_of(_Trials(copy, variant, layers))
                plan = plan.joined(other)
        except Exception:  # noqa: S112 (the model may not take such values: they are not met then)
            continue
    return plan


def _whole(batch: Batch) -> Iterator[Batch]:
    """Yield the batch with ones in the place of each leaf of integers or flags."""
    for leaf in batch_leaves((batch.args, batch.kwargs)):
        if batch.holds_examples(leaf) and isinstance(leaf, Tensor) and not leaf.is_floating_point():

            def ones(other: Any, chosen: Tensor = leaf) -> Any:
                return torch.ones_like(other) if other is chosen else other

            yield batch.map(ones)


def _plan_of(trials: _Trials) -> tuple[Plan, list[Sizes]]:
    """Return the plan for one batch, and the functions that were called in the first run."""
    copy, batch, layers = trials.copy, trials.batch, trials.layers
    rows = next(partitions(batch.size))[0]
    among = Companions(batch.size, len(rows), rows, range(len(rows)))
    functions, calls = trials.sizes(batch)
    fewer, fewer_calls = trials.sizes(batch.select(rows))
    if not aligned(functions, fewer):
        # The first run may have filled caches.
        functions, calls = trials.sizes(batch)
        fewer, fewer_calls = trials.sizes(batch.select(rows))
    tolerance = tolerated(trials.steady, copy.device)
    passed_by = _passed_by(layers, calls, fewer_calls, among)
    needed = passed_by or needs_plan(layers)
    if not aligned(functions, fewer):
        if not needed:
            return Plan({}), functions
        raise RefusedError(Problem("(root)", problems.unsteady_functions()))
    following = []
    for one, other in zip(functions, fewer, strict=True):
        try:
            following.append(_following(one, other, among))
        except PairsError:
            following.append(None)
    # What follows the batch's size but not in proportion is refused if a parameter meets it.
    meets = [one is None or any(one[0]) or any(one[1]) for one in following]
    recorder, outputs = trials.record(batch, meets, passed_by)
    seen = recorder.seen
    if not seen:
        return Plan({}, frozenset(), frozenset(passed_by)), functions
    found: dict[int, list[list[Place]]] = {}
    for number, one in seen.items():
        places = following[number]
        if places is None or any(places[0][index] for index in one.call.made):
            raise RefusedError(Problem("(root)", problems.pairs_in_function(_told(one), one.call.name)))
        if one.call.is_in_place and 0 in one.call.made:
            raise RefusedError(Problem("(root)", problems.pairs_in_function(_told(one), one.call.name)))
        found[number] = [list(where) for where in (*places[0], *places[1])]
    for pair in partitions(batch.size):
        for part in pair:
            other, _ = trials.record(batch.select(part), meets, passed_by)
            where = Companions(batch.size, len(part), part, range(len(part)))
            _narrow(seen, other.seen, found, where, tolerance)
    templates = {number: _template(seen[number], found[number]) for number in seen}
    _resolve(trials, templates, seen, found, meets, passed_by, outputs, tolerance)
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
    found_plan = Plan(
        {key: tuple(each[:1] if len(set(each)) == 1 else each) for key, each in plan.items()},
        frozenset(name.rpartition(".")[0] for name in names),
        frozenset(passed_by),
    )
    return found_plan, functions


def _passed_by(
    layers: Mapping[str, Layer],
    calls: Sequence[LayerCall],
    fewer: Sequence[LayerCall],
    among: Companions,
) -> set[str]:
    """Return the layers whose inputs or outputs have the batch elsewhere than their rule takes it.

    Where the calls are not the same in both runs, each layer is left to its rule.
    """
    found = set()
    for one, other in zip(calls, fewer, strict=False):
        layer = layers[one.name]
        if one.name != other.name or layer.recurrence is not None:
            continue
        counts = ((one, among.before), (other, among.after))
        if any(_rows_of(layer, call) - {count} for call, count in counts):
            found.add(one.name)
    return found


def _rows_of(layer: Layer, call: LayerCall) -> set[int]:
    """Return how many examples the inputs and the output of a call hold, as the rule sees it."""
    try:
        sizes = {*layer.rule.batch_sizes(layer.arguments.get(call.args, call.kwargs))}
    except Exception:  # whatever is wrong with such a call, the guard says it better
        return set()
    axis = layer.arguments.batch_axis
    if isinstance(call.output, Tensor) and call.output.dim() > axis:
        sizes.add(call.output.shape[axis])
    return sizes


def _following(
    one: Sizes, other: Sizes, among: Companions
) -> tuple[list[list[Place]], list[list[Place]]]:
    return (
        [places_of(a, b, among) for a, b in zip(one.arguments, other.arguments, strict=True)],
        [places_of(a, b, among) for a, b in zip(one.results, other.results, strict=True)],
    )


def _told(seen: Seen) -> str:
    return ", ".join(sorted(seen.call.names))


def _narrow(
    seen: Mapping[int, Seen],
    other: Mapping[int, Seen],
    found: Mapping[int, list[list[Place]]],
    where: Companions,
    tolerance: float,
) -> None:
    """Leave of the places of each tensor those at which the examples are the same in both runs."""
    for number, one in seen.items():
        if number not in other:
            raise RefusedError(Problem("(root)", problems.unsteady_functions()))
        pairs = zip(
            (*one.arguments, *one.results),
            (*other[number].arguments, *other[number].results),
            found[number],
            strict=True,
        )
        for x, y, places in pairs:
            if not places or not isinstance(x, Tensor):
                continue
            places[:] = [p for p in places if _same_rows(x, y, p, where, tolerance)]
            if not places:
                raise RefusedError(Problem("(root)", problems.moved_in_function(_told(one), one.call.name)))


def _same_rows(x: Tensor, y: Tensor, place: Place, where: Companions, tolerance: float) -> bool:
    x, y = (_real(t.detach()) for t in (x, y))
    before = place.rows(x, where.before)[list(where.rows)]
    after = place.rows(y, where.after)[list(where.places)]
    return before.shape == after.shape and close(before, after, tolerance)


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _template(seen: Seen, found: Sequence[Sequence[Place]]) -> Template:
    """Return a template; of several places the one that agrees with those that are known."""
    known = {places[0].inner for places in found if len(places) == 1 and places[0].folded}
    inner = known.pop() if len(known) == 1 else False
    chosen = [
        None if not places else next((p for p in places if p.inner == inner), places[0])
        for places in found
    ]
    count = len(seen.arguments)
    return Template(
        tuple(chosen[:count]), tuple(chosen[count:]), "graph" if seen.random else "vmap"
    )


def _resolve(
    trials: _Trials,
    templates: dict[int, Template],
    seen: Mapping[int, Seen],
    found: Mapping[int, Sequence[Sequence[Place]]],
    meets: Sequence[bool],
    passed_by: Iterable[str],
    outputs: Sequence[Tensor],
    tolerance: float,
) -> None:
    """Check the place of results that are alike for every example: what becomes of them tells.

    They are changed for some examples; the others' outputs must stay.
    """
    size = trials.batch.size
    for kept, _ in partitions(size):
        changes = {}
        for number, template in templates.items():
            results = seen[number].results
            if any(
                place is not None and _constant(x, place, size)
                for x, place in zip(results, template.outputs, strict=True)
            ):
                changes[number] = _disturbing(template, kept, size)
        if not changes:
            return
        _, changed = trials.record(trials.batch, meets, passed_by, changes)
        # The model's own outputs are in the batch's order.
        axis = trials.batch.axis
        for x, y in zip(outputs, changed, strict=True):
            if x.dim() <= axis or x.shape[axis] != size:
                continue
            a, b = x.movedim(axis, 0)[kept], y.movedim(axis, 0)[kept]
            if not close(a, b, tolerance):
                first = seen[next(iter(changes))]
                raise RefusedError(Problem("(root)", problems.moved_in_function(_told(first), first.call.name)))


def _constant(x: Any, place: Place, size: int) -> bool:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return False
    rows = place.rows(x.detach(), size)
    return close(rows, rows[:1].expand_as(rows), 0.0)


def _disturbing(template: Template, kept: Sequence[int], size: int) -> Any:
    def change(result: Any) -> Any:
        leaves, spec = pytree.tree_flatten(result)
        generator = torch.Generator().manual_seed(3)
        for index, place in enumerate(template.outputs):
            x = leaves[index]
            if place is None or not isinstance(x, Tensor) or not x.is_floating_point():
                continue
            rows = place.rows(x.detach(), size)
            noise = torch.randn(rows.shape, generator=generator).to(rows)
            noise[list(kept)] = 0
            leaves[index] = place.put_back(rows + noise)
        return pytree.tree_unflatten(leaves, spec)

    return change


def is_followed(layer: Layer) -> bool:
    """Return whether a layer has no rule of its own."""
    return isinstance(layer.rule, FunctionRule)


def needs_plan(layers: Mapping[str, Layer]) -> bool:
    """Return whether some layer has no rule of its own."""
    return any(map(is_followed, layers.values()))
