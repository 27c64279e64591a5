"""Functions that a model calls on trainable parameters outside the layers that have a rule.

A class token, a position table, a layer scale, the weight of a normalisation written by hand, a
weight that a parametrization computes: sooner or later such a parameter, or what was computed from
parameters alone, meets the examples in one call of a function of torch. `ParameterFunctions` sees
every call. What is computed from parameters alone stays on a graph of its own (`Made`). A subclass
says what happens where that meets the examples (`called`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from opacus_bpclip.model.function_call import FunctionCall, Made, site_of_call
from opacus_bpclip.model.plan import Plan

# Attributes are set on the parameter itself.
_OF_PARAMETERS = frozenset({"__set__", "__delete__", "requires_grad_", "register_hook"})


class Followed:
    """What is followed in the forward pass at hand.

    Attributes:
        plan: what trial runs have shown of such a pass.
        mode: sees the functions; ``None`` if none is called on parameters.
    """

    def __init__(self) -> None:
        self.plan = Plan({})
        self.mode: ParameterFunctions | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy starts with, outside a forward pass."""
        return {"plan": self.plan, "mode": None}

    def passes_by(self, name: str) -> bool:
        """Return whether functions are followed in a layer, in the place of its own rule."""
        return name in self.plan.passed_by

    def pause(self) -> None:
        """Let a layer with a rule run as it is."""
        if self.mode is not None:
            self.mode.paused = True

    def resume(self) -> None:
        """End that."""
        if self.mode is not None:
            self.mode.paused = False


class ParameterFunctions(TorchFunctionMode):
    """Sees every function that a model calls on some parameters.

    Args:
        parameters: by name. A parameter with two names has the first.

    Attributes:
        paused: whether a layer with a rule runs, which uses its parameters itself.
        leaves: what stands for the parameters on the private graph, by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.paused = False
        self._shared: WeakIdKeyDictionary | None = None
        self._known: dict[int, Made] = {}
        for name, parameter in parameters.items():
            if id(parameter) not in self._known:
                leaf = parameter.detach().requires_grad_()
                self._known[id(parameter)] = Made(parameter, leaf, frozenset((name,)))
        self.leaves = {name: m.value for m in self._known.values() for name in m.names}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._shared is not None:
            return self._note_shared(func, types, args, kwargs)
        return self._follow(func, args, kwargs)

    def note_arguments(
        self, without_examples: Iterable[Tensor], examples: Iterable[Tensor] = ()
    ) -> None:
        """Note which of the model's arguments hold no examples, and which do.

        What is computed from those without may be data, of nobody in particular: it must not be all
        that a function meets a parameter with. Nor must what is computed from examples, but has
        lost their number.
        """
        noted = {**dict.fromkeys(examples, False), **dict.fromkeys(without_examples, True)}
        if noted:
            self._shared = WeakIdKeyDictionary(noted)

    def _note_shared(
        self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        shared = self._shared
        assert shared is not None
        result = self._follow(func, args, kwargs)
        name = str(getattr(func, "__name__", func))
        if name.startswith("new_") or name.endswith("_like"):
            return result  # Of the sizes alone.
        leaves = pytree.tree_leaves((args, kwargs))
        of = [shared[leaf] for leaf in leaves if isinstance(leaf, Tensor) and leaf in shared]
        if of:
            for value in pytree.tree_leaves(result):
                if isinstance(value, Tensor):
                    shared[value] = any(of)
        return result

    def is_of_shared(self, call: FunctionCall) -> bool:
        """Return whether an argument was computed from the model's arguments without examples."""
        return any(self._noted(call))

    def is_of_examples(self, call: FunctionCall) -> bool:
        """Return whether an argument was computed from examples, where these are noted."""
        return False in self._noted(call)

    def _noted(self, call: FunctionCall) -> list[bool]:
        shared = self._shared
        if shared is None:
            return []
        return [shared[leaf] for leaf in call.leaves if isinstance(leaf, Tensor) and leaf in shared]

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.paused or not torch.is_grad_enabled() or not self._meets(args, kwargs):
            return func(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        made = {
            index: self._known[id(leaf)]
            for index, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and id(leaf) in self._known
        }
        call = FunctionCall(func, leaves, spec, made, site_of_call())
        if not made or call.name in _OF_PARAMETERS:
            return func(*args, **kwargs)
        return self.called(call)

    @abstractmethod
    def called(self, call: FunctionCall) -> Any:
        """Return the result of a call that has something made from parameters among its arguments.

        Args:
            call: the call.
        """

    def derive(self, call: FunctionCall) -> Any:
        """Return the result of a call that meets no examples, and know it by sight from now on."""
        leaves = list(call.leaves)
        for index, made in call.made.items():
            leaves[index] = made.value
        with torch.enable_grad():
            if call.is_in_place:
                # On the model's own tensor: it is what the model looks at afterwards.
                args, kwargs = pytree.tree_unflatten(leaves, call.spec)
                result = call.func(*args, **kwargs)
            else:
                result = call.run(leaves)
        changed = call.leaves[:1] if call.is_in_place else []
        for value in (*pytree.tree_leaves(result), *changed):
            if isinstance(value, Tensor) and value.requires_grad:
                self._known[id(value)] = Made(value, value, call.names)
        return result

    def forget(self) -> None:
        """Let go of what was computed from parameters."""
        self._known.clear()

    def _meets(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> bool:
        return any(map(self._is_known, args)) or any(map(self._is_known, kwargs.values()))

    def _is_known(self, value: Any) -> bool:
        if isinstance(value, Tensor):
            return id(value) in self._known
        return isinstance(value, (tuple, list, dict)) and any(
            map(self._is_known, value.values() if isinstance(value, dict) else value)
        )
