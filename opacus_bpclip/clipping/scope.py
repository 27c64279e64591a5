"""A scope: the uses of layers that share one factor for each example.

With a joint budget a scope is one forward pass of the model. With a budget for each layer it is one
use of a layer or, for the layers of a recurrent network, all time steps of a forward pass.

The scope's `token` is an input of every node in it. So autograd runs the token's backward function
after those of all nodes. By then all uses have been measured, and the clipped sums can be computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from opacus_bpclip.clipping.factors import (
    Factors,
    Measured,
    Target,
    centred_count,
    clip_factors,
    everywhere,
)
from opacus_bpclip.clipping.together import added, adds_up, measure_together, merged
from opacus_bpclip.clipping.use import ALL, Clipped, Sums, Use
from opacus_bpclip.config import Propagate
from opacus_bpclip.errors import PrivacyViolationError
from opacus_bpclip.guard.call_checks import changed_since
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.rules import Bound
from opacus_bpclip.rules.first_order import first_order

_ENDED_BEFORE = (
    "Two backward passes went through parts of one forward pass. Each would use the whole of "
    "max_grad_norm, so one example would contribute twice. Add the losses and call backward once."
)

Deliver = Callable[[dict[nn.Parameter, Tensor]], None]
Gathered = Callable[[Layer], AbstractContextManager[None]]


class Scope:
    """The uses of layers whose gradients are scaled by one factor for each example.

    Args:
        target: the norm that an example's joint gradient is scaled to.
        bound: the bound on an example's gradient.
        at_once: whether the scope has a single use, which is clipped as soon as its gradient
            arrives.
        propagate: which gradient this use then passes on to the layers below, ``"clipped"`` or
            ``"unclipped"``. Without ``at_once`` it is never clipped.
        present: ``[B]`` bool, which rows are not padding; ``None`` for all.
        mean: whether a mean loss divides the gradients by the batch's size.

    Attributes:
        token: an input of every node in the scope.
        begin: called when a gradient arrives at a node.
        deliver: called with the sums, in eager mode.
        fail: raises an error with the given message.
        gathered: returns a context in which a layer's sharded parameters are gathered.
    """

    token: Tensor | None = None

    def __init__(
        self,
        target: Target,
        bound: Bound,
        *,
        at_once: bool,
        propagate: Propagate,
        mean: bool,
        present: Tensor | None = None,
    ) -> None:
        self.present = present
        self.mean = mean
        self.target = target
        self.bound = bound
        self.at_once = at_once
        self.propagate = propagate
        self.begin: Callable[[], None] = _nothing
        self.deliver: Deliver | None = None
        self.fail: Callable[[str], None] = _raise
        self.gathered: Gathered = always_gathered
        self._task: int | None = None  # the backward pass that `_kept` belongs to
        self._ended = False
        self._calls: dict[str, int] = {}  # the number of calls, by group
        self._groups: dict[str, str] = {}  # the group, by layer
        self._kept: dict[str, list[Use]] = {}  # the uses, by group
        self._found: dict[str, Measured] = {}  # the measurements of groups called once
        self._sums: dict[nn.Parameter, Tensor] = {}

    def open(
        self,
        parameters: Iterable[nn.Parameter] = (),
        traced: Sequence[Tensor] = (),
        counters: Sequence[Tensor] = (),
        device: torch.device | str = "cpu",
    ) -> Scope:
        """Make the token.

        Args:
            parameters: the parameters that a traced graph makes sums for; empty in eager mode,
                where `deliver` gets the sums.
            traced: in a traced graph, the tensors that autograd sends these sums to.
            counters: in a traced graph, the tensors to which the scope sends a 1.
            device: the device of the token in eager mode, that of the layers. Autograd runs the
                token's backward function on this device, on an accelerator in the stream that
                created the token.
        """
        self._parameters = tuple(parameters)
        # An input must require a gradient, or autograd would never call the backward function.
        start = (*traced, *counters) if counters else (unwatched_token(device),)
        self.token = _End.apply(self, *start)
        return self

    def enter(self, layer: Layer, group: str) -> None:
        """Count a call of a layer.

        Args:
            layer: the layer.
            group: the name of its group, the layers that share its parameters.
        """
        self._calls[group] = self._calls.get(group, 0) + 1
        self._groups[layer.name] = group

    def arrive(self, use: Use) -> tuple[Tensor | None, ...]:
        """Measure a use whose gradient has arrived; return the gradients of the layer's inputs."""
        self.begin()
        if self.at_once:
            sums, inputs = self._clip(use)
            self._add(use, sums)
            return inputs
        if not torch.compiler.is_compiling():
            self._keep_one_task()
        group = self._groups[use.layer.name]
        inputs = use.input_gradients(None)
        use = use.in_order()
        if self._calls[group] == 1:
            self._found[group] = use.measure()
        self._kept.setdefault(group, []).append(use)
        return inputs

    def _clip(self, use: Use) -> Clipped:
        """Clip the only use; return its sums and the gradients that it passes on."""
        if self.propagate == "clipped":
            return use.clip(lambda found, rows=ALL: self._counted(found, use, rows))
        inputs = use.input_gradients(None)
        return Clipped(use.sums(self._counted(use.measure(), use, ALL)), inputs)

    def _keep_one_task(self) -> None:
        """Drop uses of an earlier backward pass, which only computed gradients of some inputs."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._kept, self._found, self._task = {}, {}, task

    def close(self) -> None:
        """Drop the token: no more nodes are added. The graph keeps the token alive."""
        self.token = None

    def forget(self) -> None:
        """Drop all uses and sums: their backward pass was interrupted."""
        self._kept, self._found, self._sums = {}, {}, {}

    def finish(self) -> dict[nn.Parameter, Tensor]:
        """Return the sums of the clipped gradients, and forget everything."""
        if self._ended and not torch.compiler.is_compiling():
            self.fail(_ENDED_BEFORE)
        self._ended = True
        if self._kept:
            self._clip_kept()
        sums, self._sums = self._sums, {}
        return sums

    def _clip_kept(self) -> None:
        """Measure groups with several uses, compute the factors, then the sums one by one."""
        kept, self._kept = self._kept, {}
        found, self._found = self._found, {}
        if not torch.compiler.is_compiling():
            for use in (use for uses in kept.values() for use in uses):
                if use.has_changed():
                    self.fail(changed_since(use.layer))
        for group in kept:
            if group not in found:
                kept[group] = list(merged(kept[group]))
                with self._all_gathered(kept[group]):
                    found[group] = measure_together(kept[group], self.bound, mean=self.mean)
        usable = everywhere(each.usable for each in found.values())
        # The groups are orthogonal parts of one gradient: the squares add up. In double precision
        # the rounding errors of this sum are negligible for any number of layers.
        parts = torch.stack([each.bound for each in found.values()]).double()
        # Divided by the largest part, so that no square overflows.
        largest = parts.amax(dim=0).clamp(min=torch.finfo(parts.dtype).tiny)
        total = Measured(torch.linalg.vector_norm(parts / largest, dim=0) * largest, usable)
        self._count(total, next(use for uses in kept.values() for use in uses), ALL)
        shared: dict[tuple[torch.dtype, int], Factors] = {}
        while kept:
            uses = kept.pop(next(iter(kept)))
            if adds_up(uses, self.bound):
                with self._all_gathered(uses):
                    sums = added(uses, self._shared_factors(total, uses[0], shared))
                for parameter, own in sums.items():
                    self._sum(parameter, own)
                continue
            for use in uses:
                with self.gathered(use.layer) if use.reads_parameters else nullcontext():
                    self._add(use, use.sums(self._shared_factors(total, use, shared)))

    @contextmanager
    def _all_gathered(self, uses: Iterable[Use]) -> Iterator[None]:
        """Gather the parameters of all layers of some uses inside this context."""
        with ExitStack() as stack:
            for layer in {use.layer.name: use.layer for use in uses}.values():
                stack.enter_context(self.gathered(layer))
            yield

    def _shared_factors(
        self, total: Measured, use: Use, shared: dict[tuple[torch.dtype, int], Factors]
    ) -> Factors:
        """Return the factors of a use, computed once for all uses that need the same."""
        if torch.compiler.is_compiling():  # sizes are symbols; the compiler merges equal factors
            return self._factors(total, use)
        key = use.dtype, use.examples
        if key not in shared:
            shared[key] = self._factors(total, use)
        return shared[key]

    def _factors(self, found: Measured, use: Use, rows: slice = ALL) -> Factors:
        present = None if self.present is None else self.present[rows]
        return clip_factors(found, self.target, use.dtype, examples=use.examples, present=present)

    def _counted(self, found: Measured, use: Use, rows: slice) -> Factors:
        self._count(found, use, rows)
        return self._factors(found, use, rows)

    def _count(self, found: Measured, use: Use, rows: slice) -> None:
        """Count the examples within the threshold, once for each example of the scope."""
        tally = self.target.tally
        if tally is None:
            return
        present = None if self.present is None else self.present[rows]
        self._sum(tally, centred_count(found, self.target, examples=use.examples, present=present))

    def _add(self, use: Use, sums: Sums) -> None:
        for name, total in sums.items():
            self._sum(use.layer.named_parameters[name], total)

    def _sum(self, parameter: nn.Parameter, total: Tensor) -> None:
        earlier = self._sums.get(parameter)
        self._sums[parameter] = total if earlier is None else earlier + total


class _End(torch.autograd.Function):
    """The end of a scope's backward pass."""

    @staticmethod
    def forward(ctx: Any, scope: Scope, *start: Tensor) -> Tensor:
        ctx.scope, ctx.count = scope, len(start)
        ctx.counters = len(start) - len(scope._parameters)
        return start[0].new_empty(())  # its value is never read

    @staticmethod
    @first_order
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        scope: Scope = ctx.scope
        sums = scope.finish()
        if scope.deliver is not None:
            scope.deliver(sums)
            return (None,) * (1 + ctx.count)
        gradients = (sums.get(parameter) for parameter in scope._parameters)
        return None, *gradients, *(torch.ones(()) for _ in range(ctx.counters))


def unwatched_token(device: torch.device | str = "cpu") -> Tensor:
    """Return a token that belongs to no scope."""
    return torch.empty((), device=device, requires_grad=True)


def always_gathered(_: Layer) -> AbstractContextManager[None]:
    """Do nothing: the parameters are not sharded."""
    return nullcontext()


def _nothing() -> None:
    return None


def _raise(reason: str) -> None:
    raise PrivacyViolationError(reason)
