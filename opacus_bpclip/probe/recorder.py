"""Runs of a copy of a model in which calls of functions on parameters are written down."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from opacus_bpclip.model.function_call import FunctionCall
from opacus_bpclip.model.function_checks import data_argument
from opacus_bpclip.model.functions import ParameterFunctions
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.model.plan import CallKey, Plan, Template
from opacus_bpclip.probe.batches import Batch
from opacus_bpclip.probe.copies import Copy
from opacus_bpclip.probe.problems import Problem, RefusedError
from opacus_bpclip.probe.randomness import Steady, tolerated
from opacus_bpclip.probe.shapes import LayerCall, Sizes, SizesOfFunctions, watch_layers
from opacus_bpclip.rules import BroadcastRule, FunctionRule


@dataclass
class Seen:
    """A call of a function that met examples, in one run.

    Attributes:
        call: the call, on tensors that are cut off from all others.
        results: its flattened results.
        random: whether it drew numbers.
    """

    call: FunctionCall
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
        of_shared: those of them that meet what was computed from arguments without examples.
        disturbed: by number, how to change what calls return.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], meets: Sequence[bool], steady: Steady
    ) -> None:
        super().__init__(parameters)
        self.seen: dict[int, Seen] = {}
        self.derived: dict[int, CallKey] = {}
        self.of_shared: list[FunctionCall] = []
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
                if self.is_of_examples(call):
                    raise RefusedError(Problem("(root)", data_argument(call)))
                if self.is_of_shared(call):
                    self.of_shared.append(call)
                self.derived[self._number] = key
            return result
        leaves = [_cut_off(leaf) for leaf in call.leaves]
        for index, made in call.made.items():
            # One leaf for each: a parameter may be two arguments.
            leaves[index] = made.value.detach().requires_grad_()
        random, self._steady.random = self._steady.random, False
        # Not the hooks of activation checkpointing, which would run the model again.
        with torch.enable_grad(), saved_tensors_hooks(_itself, _itself):
            result = call.run(leaves)
        drawn, self._steady.random = self._steady.random, self._steady.random or random
        results = pytree.tree_leaves(result)
        if _depends(results, [leaves[index] for index in call.made]):
            self.seen[self._number] = Seen(replace(call, leaves=leaves), results, drawn)
        change = self.disturbed.get(self._number)
        result = pytree.tree_map(
            lambda x: x.detach().clone() if isinstance(x, Tensor) else x,
            result if change is None else change(result),
        )
        if call.is_in_place:
            call.leaves[0].copy_(result)
            return call.leaves[0] if call.name != "__setitem__" else None
        return result


def _itself(x: Tensor) -> Tensor:
    return x


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


class Replaying(ParameterFunctions):
    """Writes down the calls that meet examples, by a plan.

    Args:
        parameters: as for `ParameterFunctions`.
        plan: the plan.
        changes: by the number of a call among those that meet examples, how to change its results.

    Attributes:
        seen: the calls that meet examples, by their number.
        templates: where they have the batch.
        unknown: whether a call was none that the plan has.
        outputs: what the model returned.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], plan: Plan, changes: Mapping[int, Any]
    ) -> None:
        super().__init__(parameters)
        self.seen: dict[int, Seen] = {}
        self.templates: dict[int, Template] = {}
        self.unknown = False
        self.outputs: list[Tensor] = []
        self._plan, self._changes = plan, changes
        self._times: dict[CallKey, int] = {}

    def called(self, call: FunctionCall) -> Any:
        """Write down a call that meets examples, and return what it does."""
        template = self._template(call)
        if template is None or not template.holds_batch:
            result = self.derive(call)
            made = pytree.tree_leaves(result)
            grows = any(isinstance(x, Tensor) and x.requires_grad for x in made)
            self.unknown |= grows and template is None
            return result
        number = len(self.seen)
        arguments = [_copied(leaf) for leaf in call.leaves]
        with torch.no_grad():
            args, kwargs = pytree.tree_unflatten(call.leaves, call.spec)
            result = call.func(*args, **kwargs)
            if number in self._changes and not call.is_in_place:
                result = self._changes[number](result)
        shown = call.leaves[0] if call.is_in_place else result
        results = [_copied(value) for value in pytree.tree_leaves(shown)]
        self.seen[number] = Seen(replace(call, leaves=arguments), results, random=False)
        self.templates[number] = template
        return result

    def _template(self, call: FunctionCall) -> Template | None:
        templates = self._plan.templates.get(call.key)
        if templates is None:
            return None
        time = self._times.get(call.key, 0)
        self._times[call.key] = time + 1
        return templates[min(time, len(templates) - 1)]


def _copied(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


@dataclass
class Trials:
    """Runs of one copy of a model."""

    copy: Copy
    batch: Batch
    layers: Mapping[str, Layer]
    steady: Steady = field(default_factory=Steady)

    @property
    def tolerance(self) -> float:
        """Return up to which relative difference numbers of two runs are the same."""
        return tolerated(self.steady, self.copy.device)

    def modules(self) -> dict[str, nn.Module]:
        """Return the layers that have a rule of their own, by name, without those that copy."""
        return {
            name: layer.module
            for name, layer in self.layers.items()
            if not isinstance(layer.rule, (FunctionRule, BroadcastRule))
        }

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what stands for the trainable parameters, by the layer's name and theirs."""
        return {
            f"{name}.{own}": self.copy.of(parameter)
            for name, layer in self.layers.items()
            if not isinstance(layer.rule, BroadcastRule)  # These are given copies of them.
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
        mode = Recorder(self.parameters(), meets, self.steady)
        mode.disturbed = disturbed or {}
        return mode, self.run_with(mode, batch, passed_by)

    def replay(
        self,
        plan: Plan,
        batch: Batch,
        *,
        seed: int | None = None,
        changes: Mapping[int, Any] | None = None,
    ) -> Replaying:
        """Run the model; return the calls that meet examples by a plan.

        Args:
            plan: the plan.
            batch: on what.
            seed: of random numbers, the same in each run; ``None`` holds them still.
            changes: by the number of a call that meets examples, how to change its results.
        """
        mode = Replaying(self.parameters(), plan, changes or {})
        mode.outputs = self.run_with(mode, batch, plan.passed_by, seed=seed)
        return mode

    def run_with(
        self,
        mode: ParameterFunctions,
        batch: Batch,
        passed_by: Iterable[str],
        *,
        seed: int | None = None,
    ) -> list[Tensor]:
        """Run the model under a mode that the layers with a rule pause, but those passed by."""
        with ExitStack() as stack:
            for name, module in self.modules().items():
                if name not in passed_by:
                    for handle in _pausing(module, mode):
                        stack.callback(handle.remove)
            steady = self.steady if seed is None else None
            run = self.copy.run(batch, steady, inside=False, mode=mode, plain=True, seed=seed or 0)
        return run.outputs


def _pausing(
    module: nn.Module, mode: ParameterFunctions
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    def pause(*_: Any) -> None:
        mode.paused = True

    def resume(*_: Any) -> None:
        mode.paused = False

    yield module.register_forward_pre_hook(pause)
    yield module.register_forward_hook(resume, always_call=True)
