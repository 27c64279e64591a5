"""The sizes in every call of a function or a layer, and which of them grow with the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from opacus_bpclip.model.places import Place
from opacus_bpclip.probe.comparison import Companions, layouts

# A tensor's shape, an integer, or ``None`` for anything else.
Size = torch.Size | int | None

# Types of values without parts.
_LEAVES = frozenset((Tensor, nn.Parameter, int, float, bool, str, type(None), torch.dtype))


class Sizes(NamedTuple):
    """The sizes of one call's arguments and results.

    Attributes:
        name: the function's name.
        arguments: the sizes of the arguments, as a flat tuple.
        results: the sizes of the results, as a flat tuple.
    """

    name: str
    arguments: tuple[Size, ...]
    results: tuple[Size, ...]


class SizesOfFunctions(TorchFunctionMode):
    """Records the sizes in every call of a torch function.

    Attributes:
        calls: the calls in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Sizes] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # Before the call, which may change them in place.
        arguments = sizes_of((args, kwargs))
        result = func(*args, **kwargs)
        name = str(getattr(func, "__name__", func))
        changed = args[0] if name == "__setitem__" else result
        self.calls.append(Sizes(name, arguments, sizes_of(changed)))
        return result


def sizes_of(value: Any) -> tuple[Size, ...]:
    """Return the sizes of the leaves of a value."""
    sizes = list[Size]()
    _append_sizes(value, sizes)
    return tuple(sizes)


def _append_sizes(value: Any, sizes: list[Size]) -> None:
    # In the order of pytree's leaves, but many times faster for the arguments of most calls.
    kind = type(value)
    if kind is tuple or kind is list:
        for item in value:
            _append_sizes(item, sizes)
    elif kind is dict:
        for item in value.values():
            _append_sizes(item, sizes)
    elif kind in _LEAVES:
        sizes.append(_size(value))
    else:
        sizes.extend(map(_size, pytree.tree_leaves(value)))


def _size(leaf: Any) -> Size:
    if isinstance(leaf, Tensor):
        return leaf.shape
    return leaf if type(leaf) is int else None


class LayerCall(NamedTuple):
    """The arguments and the output of one call of a layer.

    Attributes:
        name: the layer's name.
        args: the positional arguments.
        kwargs: the keyword arguments.
        output: the output.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def watch_layers(
    layers: dict[str, nn.Module], calls: list[LayerCall]
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Yield the handles of hooks that record the calls of some layers.

    The hooks do not read sizes, since reading a tensor's shape would be recorded as a call.
    """

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.append(LayerCall(name, args, kwargs, output))

        return module.register_forward_hook(leave, with_kwargs=True)

    for name, module in layers.items():
        yield watch(name, module)


class PairsError(Exception):
    """A tensor has entries for pairs of examples, or its size depends on their values."""


def places_of(one: Size, other: Size, companions: Companions) -> list[Place]:
    """Return where an argument or result may have the batch, judged in batches of two sizes.

    The list is empty if its size does not change with the batch's.

    Raises:
        PairsError: its size changes, but not in proportion to the batch's.
    """
    before, after = companions.before, companions.after
    if type(one) is int and type(other) is int:
        if one == other:
            return []
        if one * after != other * before or one % before:
            raise PairsError
        return [Place(0, one // before)]
    if not (isinstance(one, torch.Size) and isinstance(other, torch.Size)):
        return []
    if one == other:
        return []
    found = layouts(one, other, companions)
    if not found or sum(a != b for a, b in zip(one, other, strict=True)) > 1:
        raise PairsError
    axis = found[0].axis
    if one[axis] % before:
        raise PairsError
    return [Place(axis, one[axis] // before, layout.inner) for layout in found]


def aligned(one: Sequence[Sizes], other: Sequence[Sizes]) -> bool:
    """Return whether two runs have called the same functions."""
    return [(c.name, len(c.arguments), len(c.results)) for c in one] == [
        (c.name, len(c.arguments), len(c.results)) for c in other
    ]
