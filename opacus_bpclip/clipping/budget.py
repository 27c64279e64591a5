"""The budget of a model: it decides which uses of layers share their factors in one scope."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opacus_bpclip.clipping import problems
from opacus_bpclip.clipping.ends import Ends
from opacus_bpclip.clipping.factors import Target
from opacus_bpclip.clipping.forward_passes import ForwardPasses
from opacus_bpclip.clipping.scope import Gathered, Scope, always_gathered
from opacus_bpclip.config import BackpropClipping
from opacus_bpclip.guard.forms import Forms
from opacus_bpclip.guard.guard import GradientGuard
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.rules import bound_of

Counters = tuple[Tensor | None, ...]


class Budget:
    """Opens scopes: one for each use of a layer, or with a joint budget one for all uses.

    Args:
        config: the public options.
        layers: the trainable layers.
        guard: checks every call and every gradient.
        targets: by the layer's name, its target; with a joint budget the same for all.

    Attributes:
        recurrent: the name of a layer of a recurrent network, ``None`` if there is none.
        key: the key in `BUDGETS`: a traced graph holds strings and tensors only.
        joint: whether all layers share one factor for each example.
        target: the norms of the whole model, with a joint budget.
        bound: the bound on an example's gradient.
        parameters: all trainable parameters of the layers, and the targets' tallies.
        clips: the clips of the layers; a traced graph refers to them by index.
        gathered: returns a context in which a layer's sharded parameters are gathered.
        token: the token of the scope of the forward pass that is being traced, with a joint budget.
        forwards: the tokens of all forward passes, inputs of every scope in a traced graph.
        present: ``[B]`` bool, which rows of the current batch are not padding; ``None`` for all.
        rows: the number of rows of the batch that the model was traced for, 0 if unknown; ``None``
            if the model runs in eager mode and only parts of it are traced.
    """

    def __init__(
        self,
        config: BackpropClipping,
        layers: Iterable[Layer],
        guard: GradientGuard,
        targets: Mapping[str, Target],
    ) -> None:
        layers = tuple(layers)
        self.joint = config.allocation == "joint"
        self._propagate = config.propagate
        recurrent = (layer.name for layer in layers if layer.recurrence is not None)
        self.recurrent = next(recurrent, None)
        self.target = next(iter(targets.values()))
        tallies = {n: () if t.tally is None else (t.tally,) for n, t in targets.items()}
        self._of = {layer.name: (*layer.parameters, *tallies[layer.name]) for layer in layers}
        every = (parameter for own in self._of.values() for parameter in own)
        self.parameters: tuple[nn.Parameter, ...] = tuple(dict.fromkeys(every))
        self.clips: list[Any] = []
        self.token: Tensor | None = None
        self.present: Tensor | None = None
        self.rows: int | None = None
        self._open: weakref.WeakSet[Scope] = weakref.WeakSet()
        self.bound = bound_of(config.bound)
        self.gathered: Gathered = always_gathered
        self._guard = guard
        guard.forget = self.forget
        self._scope: Scope | None = None  # of the eager forward pass
        self._traced: Callable[[], Scope | None] = _nothing
        self._trace: Callable[[], object] = _nothing  # the trace of the traced scope
        device = self.parameters[0].device if self.parameters else torch.device("cpu")
        watched = {p: guard.parameters[p] for p in self.parameters}
        self._of_all = tuple(watched.values())
        self._of_layer = {
            name: tuple([watched[p] for p in parameters]) for name, parameters in self._of.items()
        }
        self.forwards = ForwardPasses(guard, device)
        self._ends = {} if self.joint else {layer.name: Ends(layer, guard) for layer in layers}
        self._register()

    def _register(self) -> None:
        self.key = f"budget {next(_NUMBERS)}"
        BUDGETS[self.key] = self

    def __getstate__(self) -> dict[str, object]:
        left = {"key", "token", "present", "_open", "_scope", "_traced", "_trace"}
        return {name: value for name, value in vars(self).items() if name not in left}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self.token = self.present = self._scope = None
        self._traced = self._trace = _nothing
        self._open = weakref.WeakSet()
        self._register()

    # In eager mode

    def open_forward(self) -> None:
        """Begin a forward pass of the model."""
        self.forget()
        self._scope = self.rows = None
        self.forwards.open()
        if self.joint:
            self._scope = self._watched(self._new(self.target, self.present, at_once=False))

    def close_forward(self) -> None:
        """End a forward pass; from here on its autograd graph keeps the scope alive."""
        if self._scope is not None:
            self._scope.close()
        self._scope = self.token = None
        self.forwards.close()

    def scope_of(self, target: Target, *, at_once: bool) -> Scope:
        """Return the scope of a use of a layer.

        Args:
            target: the norms, if the use gets a scope of its own.
            at_once: whether the use is the only one in that scope.
        """
        if not self.joint:
            return self._watched(self._new(target, self.present, at_once=at_once))
        if self._scope is None:
            self._guard.fail(problems.ANOTHER_FORWARD)
        assert self._scope is not None
        return self._scope

    def _new(self, target: Target, present: Tensor | None, *, at_once: bool) -> Scope:
        return Scope(
            target,
            self.bound,
            at_once=at_once,
            propagate=self._propagate,
            mean=self._guard.undoes_mean,
            present=present,
        )

    def _watched(self, scope: Scope) -> Scope:
        scope.begin = self._guard.begin_backward()
        scope.deliver = self._guard.collector()
        scope.fail = self._guard.fail
        scope.gathered = self.gathered
        self._open.add(scope)
        return scope.open(device=self.parameters[0].device)

    def counters_of(self, layer: Layer) -> Counters:
        """Return the tensors to which a layer's scopes in a traced graph send a 1."""
        own = () if self.joint else (self._ends[layer.name].counter,)
        return self.forwards.token, *own

    def sinks_of(self, layer: Layer) -> tuple[Tensor, ...]:
        """Return the tensors that receive a layer's clipped sums from a traced graph."""
        return tuple([watched.sink for watched in self._of_layer[layer.name]])

    @property
    def forms(self) -> Forms:
        """Return the guard's record of the forms in which the model was called."""
        return self._guard.forms

    def forget(self) -> None:
        """Free what interrupted backward passes have left in their scopes."""
        for scope in self._open:
            scope.forget()

    # In a traced graph, where autograd carries the sums to the sinks

    def traced_token(self) -> Tensor | None:
        """Return the token of the forward pass; ``None`` without a joint budget.

        The first layer opens the scope. The model's own hook cannot, since it may run outside the
        traced graph.
        """
        if self.joint and self.token is None:
            sinks = [watched.sink for watched in self._of_all]
            self.token = _trace_forward(
                self.key, self.target.norms, self.present, (self.forwards.token,), *sinks
            )
        return self.token

    def open_traced(
        self,
        norms: Tensor,
        present: Tensor | None,
        counters: Counters,
        sinks: Sequence[Tensor],
    ) -> Tensor:
        """Open the scope of a traced forward pass; return its token.

        All arguments are the traced graph's own tensors.

        Args:
            norms: the norms of the target.
            present: ``[B]`` bool, which rows are not padding; ``None`` for all.
            counters: the tensors to which the scope sends a 1.
            sinks: the tensors that receive the sums.
        """
        trace = _this_trace()
        if self._scope is not None or trace is None:
            self._fail_without_one_graph()
        scope = self._new(self.target._replace(norms=norms), present, at_once=False)
        token = scope.open(self.parameters, sinks, self._inside(counters)).token
        assert token is not None
        # The token's graph keeps the scope alive. The references here must not outlive the trace.
        scope.close()
        self._traced = weakref.ref(scope)
        self._trace = weakref.ref(trace)
        return token

    def _inside(self, counters: Counters) -> Sequence[Tensor]:
        there = [counter for counter in counters if counter is not None]
        if len(there) < len(counters):
            self._guard.fail(problems.NO_FORWARD)
        return there

    def _fail_without_one_graph(self) -> None:
        self._guard.fail(problems.not_one_graph(self.recurrent))

    def traced_scope(
        self,
        layer: Layer,
        target: Target,
        present: Tensor | None,
        counters: Counters,
        token: Tensor | None,
        sinks: Sequence[Tensor],
    ) -> Scope:
        """Return the scope of a use of a layer in a traced graph.

        All tensors are the traced graph's own.

        Args:
            layer: the layer.
            target: the norms, if the use gets a scope of its own.
            present: ``[B]`` bool, which rows are not padding; ``None`` for all.
            counters: the tensors from `counters_of`.
            token: the token of the forward pass, with a joint budget.
            sinks: the tensors from `sinks_of`.
        """
        for watched in self._of_layer[layer.name]:
            self._guard.require(watched.moved())
        if not self.joint:
            scope = self._new(target, present, at_once=True)
            return scope.open(self._of[layer.name], sinks, self._inside(counters))
        shared = self._traced()
        if shared is None or token is None or self._trace() is not _this_trace():
            self._fail_without_one_graph()
        assert shared is not None
        shared.token = token
        return shared


BUDGETS: weakref.WeakValueDictionary[str, Budget] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


@torch._dynamo.allow_in_graph
def _trace_forward(
    key: str, norms: Tensor, present: Tensor | None, counters: Counters, *sinks: Tensor
) -> Tensor:
    return BUDGETS[key].open_traced(norms, present, counters, sinks)


def _this_trace() -> torch._guards.TracingContext | None:
    return torch._guards.TracingContext.try_get()


def _nothing() -> None:
    return None
