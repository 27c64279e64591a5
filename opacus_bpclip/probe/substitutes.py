"""Substitutes for the tensors of a model, for a while; afterwards the model is restored.

Tensors and modules are compared by identity, not by name: one tensor under two names gets one
substitute. Afterwards each module has its former attributes, parameters, buffers, submodules, hooks
and flags, the same objects in the same order, whatever the forward pass has set, added or deleted.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opacus_bpclip.probe.buffers import numbers
from opacus_bpclip.probe.comparison import equal
from opacus_bpclip.probe.leaves import parts_of

Make = Callable[[Tensor], Tensor]

_HOLDERS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)
_PLAIN_TENSORS = (Tensor, nn.Parameter)


class Substitutes:
    """Replaces the tensors of a model from `__enter__` to `__exit__`.

    Tensors are found in the model's modules, in containers in their attributes, and in the
    attributes and containers of plain objects there. The search does not go deeper: an object in
    such an object (a trainer's, a data set's) is left as it is.

    Args:
        model: the model.
        make: returns the substitute of a tensor; it may return the tensor itself.
    """

    def __init__(self, model: nn.Module, make: Make) -> None:
        self._make = make
        self._holders: list[tuple[Any, Any]] = []  # each container with its content
        self._copies: dict[int, tuple[Any, Any, int]] = {}  # of arrays that have no substitute
        self._generators: list[tuple[Any, Any]] = []  # each with its state
        self._made: dict[int, tuple[Tensor, Tensor]] = {}
        self._tuples: dict[int, tuple[Any, Any]] = {}  # each with its substitute
        self._buffers: list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]] = []
        self._seen: dict[int, Any] = {}
        self._look_into(model, objects=1)

    def __enter__(self) -> Substitutes:
        try:
            for holder, content in self._holders:
                _refill(holder, self._replaced(content))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        for holder, content in self._holders:
            _refill(holder, content)
        for own, *_ in self._copies.values():
            self._put_values_back(own)
        self._put_generators_back()

    def begin_run(self, *, carry: bool = False) -> None:
        """Restore the model's own random number generators, and the values of buffers.

        Args:
            carry: leave the buffers as they are.
        """
        for holder, content in self._buffers if not carry else ():
            for name, buffer in content.items():
                holder[name] = None if buffer is None else self._renewed(buffer)
        self._put_generators_back()

    def attributes_changed(self) -> bool:
        """Return whether runs have changed anything but parameters, buffers and generators."""
        buffers = {id(buffer) for _, content in self._buffers for buffer in content.values()}
        return (
            any(
                not _holds(holder, self._replaced(content))
                for holder, content in self._holders
                if not any(holder is own for own, _ in self._buffers)
            )
            or any(
                not equal(numbers(own), numbers(self._make(tensor)))
                for tensor, own in self._made.values()
                if not (own is tensor or isinstance(own, nn.Parameter) or id(tensor) in buffers)
            )
            or any(
                not np.array_equal(own, copy)
                if isinstance(own, np.ndarray)
                else own._version != version
                for own, copy, version in self._copies.values()
            )
        )

    def of(self, tensor: Tensor) -> Tensor:
        """Return the substitute of a tensor of the model."""
        if id(tensor) not in self._made:
            own = tensor if id(tensor) in self._copies else self._make(tensor)
            self._made[id(tensor)] = tensor, own
        return self._made[id(tensor)][1]

    def _renewed(self, buffer: Tensor) -> Tensor:
        substitute = self.of(buffer)
        if substitute is buffer:
            self._put_values_back(buffer)
        else:
            # Keep the object: another attribute may refer to it as well.
            substitute.data = self._make(buffer)
        return substitute

    def _put_values_back(self, own: Any) -> None:
        _, copy, version = self._copies.get(id(own), (own, None, None))
        if copy is None:
            return
        if isinstance(own, np.ndarray):
            own[...] = copy
        elif own._version != version:
            with torch.no_grad():
                own.copy_(copy)

    def _put_generators_back(self) -> None:
        for generator, state in self._generators:
            _set_state(generator, state)

    def _look_into(self, value: Any, *, objects: int) -> None:
        if id(value) in self._seen:
            return
        if isinstance(value, nn.Module):
            self._seen[id(value)] = value
            self._look_into_module(value)
        elif isinstance(value, (Tensor, np.ndarray)):
            if type(value) not in _PLAIN_TENSORS:
                self._keep(value)
        elif type(value) in _HOLDERS:
            self._seen[id(value)] = value
            self._holders.append((value, value.copy()))
            for part in value.values() if isinstance(value, dict) else value:
                self._look_into(part, objects=objects)
        elif isinstance(value, tuple):
            for part in value:
                self._look_into(part, objects=objects)
        elif (state := _state_of(value)) is not None:
            self._seen[id(value)] = value
            self._generators.append((value, state))
        elif objects and parts_of(value) is not None and hasattr(value, "__dict__"):
            self._seen[id(value)] = value
            self._look_into_attributes(vars(value), objects=objects - 1)

    def _look_into_module(self, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            # The tensors of a compiled module cannot be replaced: restore their values.
            for tensor in (*module.parameters(), *module.buffers()):
                self._keep(tensor)
            return
        self._look_into_attributes(vars(module), objects=1)
        self._buffers.append((module._buffers, dict(module._buffers)))

    def _look_into_attributes(self, attributes: dict[str, Any], *, objects: int) -> None:
        self._holders.append((attributes, dict(attributes)))
        for part in attributes.values():
            self._look_into(part, objects=objects)

    def _keep(self, own: Any) -> None:
        if isinstance(own, np.ndarray):
            self._copies[id(own)] = own, own.copy(), 0
        else:
            self._copies[id(own)] = own, own.detach().clone(), own._version

    def _replaced(self, content: Any) -> Any:
        if isinstance(content, dict):
            return {key: self._swapped(part) for key, part in content.items()}
        return [self._swapped(part) for part in content]

    def _swapped(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.of(value)
        if type(value) is tuple or hasattr(value, "_make"):
            if id(value) not in self._tuples:
                self._tuples[id(value)] = value, self._swapped_tuple(value)
            return self._tuples[id(value)][1]
        return value

    def _swapped_tuple(self, value: Any) -> Any:
        made = [self._swapped(part) for part in value]
        if all(a is b for a, b in zip(value, made, strict=True)):
            return value
        return value._make(made) if hasattr(value, "_make") else tuple(made)


def _refill(holder: Any, content: Any) -> None:
    if _holds(holder, content):
        # Refilling an unchanged dictionary could make torch.compile trace the model again.
        return
    holder.clear()
    (holder.extend if isinstance(holder, (list, deque)) else holder.update)(content)


def _holds(holder: Any, content: Any) -> bool:
    """Return whether a container has exactly these objects, in this order."""
    own, others = (
        [part for pair in value.items() for part in pair] if isinstance(value, dict) else [*value]
        for value in (holder, content)
    )
    return len(own) == len(others) and all(a is b for a, b in zip(own, others, strict=True))


def _state_of(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.RandomState):
        return value.get_state()
    return value.bit_generator.state if isinstance(value, np.random.Generator) else None


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def lazy_parameter(model: nn.Module) -> str | None:
    """Return the name of a parameter that gets its shape on the first forward pass, if any."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            return name
    return None
