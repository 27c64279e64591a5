"""Follow the functions that a model calls on trainable parameters outside of layers with a rule.

Such parameters are class tokens, position tables, layer scales, the weights of a normalisation
written by hand, or of a parametrization. At some point a function of torch combines such a
parameter, or a tensor computed from parameters alone, with the examples. `ParameterFunctions` sees
every call. It keeps tensors computed from parameters alone on a detached graph (`Made`). Its
subclasses handle the calls that combine them with examples (`called`).
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

# These functions set attributes of the parameter itself.
_OF_PARAMETERS = frozenset({"__set__", "__delete__", "requires_grad_", "register_hook"})


class Followed:
    """The functions that are followed in the current forward pass.

    Attributes:
        plan: what the trial on made-up examples has found about such a pass.
        mode: the mode that sees the calls; ``None`` if no function is called on parameters.
    """

    def __init__(self) -> None:
        self.plan = Plan({})
        self.mode: ParameterFunctions | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: it starts outside of a forward pass."""
        return {"plan": self.plan, "mode": None}

    def passes_by(self, name: str) -> bool:
        """Return whether a layer is clipped by the functions that it calls, not by its rule."""
        return name in self.plan.passed_by

    def pause(self) -> None:
        """Stop following while a layer with a rule runs."""
        if self.mode is not None:
            self.mode.paused = True

    def resume(self) -> None:
        """Continue following."""
        if self.mode is not None:
            self.mode.paused = False


class ParameterFunctions(TorchFunctionMode):
    """A mode that sees every function that a model calls on some parameters.

    Args:
        parameters: the parameters, by name. A parameter with two names gets the first.

    Attributes:
        paused: whether a layer with a rule is running, whose calls are not followed.
        leaves: by name, the leaves that replace the parameters on the detached graph.
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

        A tensor computed from an argument without examples may still be data, but it is not known
        of which example. A function must not combine a parameter with such tensors alone, nor with
        tensors alone that were computed from examples but have lost the batch axis.

        Args:
            without_examples: the arguments that hold no examples.
            examples: the arguments that hold examples.
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
            return result  # The result depends on sizes, not on data.
        leaves = pytree.tree_leaves((args, kwargs))
        of = [shared[leaf] for leaf in leaves if isinstance(leaf, Tensor) and leaf in shared]
        if of:
            for value in pytree.tree_leaves(result):
                if isinstance(value, Tensor):
                    shared[value] = any(of)
        return result

    def is_of_shared(self, call: FunctionCall) -> bool:
        """Return whether an argument was computed from a model's argument without examples."""
        return any(self._noted(call))

    def is_of_examples(self, call: FunctionCall) -> bool:
        """Return whether an argument was computed from examples that have been noted."""
        return False in self._noted(call)

    def _noted(self, call: FunctionCall) -> list[bool]:
        shared = self._shared
        if shared is None:
            return []
        return [shared[leaf] for leaf in call.leaves if isinstance(leaf, Tensor) and leaf in shared]

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.paused or not torch.is_grad_enabled() or not self._has_known(args, kwargs):
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
        """Return the result of a call with an argument that was computed from parameters alone.

        Args:
            call: the call.
        """

    def derive(self, call: FunctionCall) -> Any:
        """Run a call without examples on the detached graph, and remember its result."""
        leaves = list(call.leaves)
        for index, made in call.made.items():
            leaves[index] = made.value
        with torch.enable_grad():
            if call.is_in_place:
                # Change the model's own tensor, which the model uses afterwards.
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
        """Drop all references to parameters and to tensors computed from them."""
        self._known.clear()

    def _has_known(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> bool:
        return any(map(self._is_known, args)) or any(map(self._is_known, kwargs.values()))

    def _is_known(self, value: Any) -> bool:
        if isinstance(value, Tensor):
            return id(value) in self._known
        return isinstance(value, (tuple, list, dict)) and any(
            map(self._is_known, value.values() if isinstance(value, dict) else value)
        )
