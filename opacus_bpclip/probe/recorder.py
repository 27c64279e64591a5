"""Runs of a copy of a model that record its calls of functions on parameters."""

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
    """A recorded call of a function on examples.

    Attributes:
        call: the call, with detached arguments.
        results: its results, as a flat list.
        random: whether it drew random numbers.
    """

    call: FunctionCall
    results: list[Any]
    random: bool


class Recorder(ParameterFunctions):
    """Records the calls on examples of functions on parameters.

    Args:
        parameters: the parameters whose functions are followed, by name.
        meets: for each call of any function, by its number, whether it has examples.
        steady: the mode that makes random numbers equal.

    Attributes:
        seen: the recorded calls, by their number.
        derived: the keys of the calls on parameters without examples, by their number.
        of_shared: those of them that also use model arguments without examples.
        disturbed: for some calls, by their number, a function that changes the result.
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
        """Record a call if it is on examples, and return its result."""
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
            # A leaf for each argument: one parameter may be two of them.
            leaves[index] = made.value.detach().requires_grad_()
        random, self._steady.random = self._steady.random, False
        # Without the hooks of activation checkpointing, which would run the model again.
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
    # Copied: the model may change it in place later.
    own = own.clone() if own.is_floating_point() or own.is_complex() else own
    return own.requires_grad_(own.is_floating_point() or own.is_complex())


def _depends(results: Iterable[Any], values: Sequence[Tensor]) -> bool:
    """Return whether a gradient flows from the results to any of these values."""
    outs = [x for x in results if isinstance(x, Tensor) and x.requires_grad]
    if not outs:
        return False
    found = torch.autograd.grad(
        outs, values, [torch.ones_like(x) for x in outs], retain_graph=True, allow_unused=True
    )
    return any(gradient is not None for gradient in found)


class Replaying(ParameterFunctions):
    """Records the calls on examples that a plan has.

    Args:
        parameters: the parameters whose functions are followed, by name.
        plan: the plan.
        changes: for some of the recorded calls, by their number, a function that changes the
            result.

    Attributes:
        seen: the recorded calls, numbered in their order.
        templates: the calls' templates in the plan, by the same numbers.
        unknown: whether a call has no template in the plan.
        outputs: the model's outputs.
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
        """Record a call if it is on examples, and return its result."""
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
    """Recorded runs of one copy of a model."""

    copy: Copy
    batch: Batch
    layers: Mapping[str, Layer]
    steady: Steady = field(default_factory=Steady)

    @property
    def tolerance(self) -> float:
        """Return the largest relative difference at which numbers of two runs count as equal."""
        return tolerated(self.steady, self.copy.device)

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules with a rule of their own, by name, except broadcast parameters."""
        return {
            name: layer.module
            for name, layer in self.layers.items()
            if not isinstance(layer.rule, (FunctionRule, BroadcastRule))
        }

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the substitutes of the trainable parameters, by dotted path."""
        return {
            f"{name}.{own}": self.copy.of(parameter)
            for name, layer in self.layers.items()
            if not isinstance(layer.rule, BroadcastRule)  # Its layer gets one copy per example.
            for own, parameter in layer.named_parameters.items()
        }

    def sizes(self, batch: Batch) -> tuple[list[Sizes], list[LayerCall]]:
        """Run the model; return the sizes in all calls of functions, and the calls of layers."""
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
        """Run the model; return the recorder and the model's outputs."""
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
        """Run the model; return the calls on examples that a plan has.

        Args:
            plan: the plan.
            batch: the batch to run on.
            seed: the seed of the random numbers; with ``None`` they are equal for all examples.
            changes: for some of the recorded calls, by their number, a function that changes the
                result.
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
        """Run the model in a mode that is paused in layers with a rule, except those passed by."""
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
