"""Walks through the structure of a batch: the only code that knows what may hold a tensor."""

from __future__ import annotations

import copy
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opacus_bpclip.model.recurrence import is_packed

Change = Callable[[Any], Any]
Path = tuple[Any, ...]

# Objects that are leaves, though they may have attributes.
_CLOSED = (
    Tensor,
    np.ndarray,
    np.generic,
    Number,
    str,
    bytes,
    type(None),
    type,
    Enum,
    nn.Module,
    torch.dtype,
    torch.device,
    torch.Size,
    torch.Generator,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    *weakref.ProxyTypes,
)


def map_leaves(value: Any, change: Change) -> Any:
    """Return a copy of a structure in which every leaf is changed.

    The structure may have tuples, lists, dictionaries, and objects with attributes (dataclasses,
    attrs classes, a `BatchEncoding`). A packed sequence is one leaf. A part in which no leaf has
    changed is not copied. An object that is in two places is changed once, and its copy is in both.
    """
    done: dict[int, tuple[Any, Any]] = {}
    copies: dict[int, Any] = {}

    def visit(own: Any) -> Any:
        if id(own) in done:
            return done[id(own)][1]
        parts = parts_of(own)
        if parts is None:
            made = change(own)
        elif id(own) in copies:
            # An object that contains itself: use its copy, which an outer call fills.
            if copies[id(own)] is None:
                copies[id(own)] = copy.copy(own)
            return copies[id(own)]
        else:
            copies[id(own)] = None
            changed = [(key, visit(part)) for key, part in parts]
            same = all(a is b for (_, a), (_, b) in zip(parts, changed, strict=True))
            made = own if same else rebuilt(own, changed, copies[id(own)])
        done[id(own)] = own, made
        return made

    return visit(value)


def named_leaves(value: Any) -> Iterator[tuple[Path, Any]]:
    """Yield the leaves that `map_leaves` would change, in its order, each with its path.

    A leaf that is in two places comes twice; a container that is in two places is searched once.
    """
    seen: dict[int, Any] = {}

    def visit(path: Path, own: Any) -> Iterator[tuple[Path, Any]]:
        parts = parts_of(own)
        if parts is None:
            yield path, own
        elif id(own) not in seen:
            seen[id(own)] = own
            for key, part in parts:
                yield from visit((*path, key), part)

    yield from visit((), value)


def batch_leaves(value: Any) -> Iterator[Any]:
    """Yield the leaves of a batch: tensors, packed sequences, and all else without parts."""
    return (leaf for _, leaf in named_leaves(value))


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any], axis: int) -> int | None:
    """Return the number of examples in a call of a model.

    Args:
        args: the positional arguments.
        kwargs: the keyword arguments.
        axis: the batch axis of a tensor.

    Returns:
        The batch size of the first packed sequence, or tensor that has this axis; ``None`` if
        there is none.
    """
    for leaf in batch_leaves((args, kwargs)):
        if is_packed(leaf):
            return int(leaf.batch_sizes[0]) if len(leaf.batch_sizes) else 0
        if isinstance(leaf, Tensor) and leaf.dim() > axis:
            return leaf.shape[axis]
    return None


def parts_of(value: Any) -> list[tuple[Any, Any]] | None:
    """Return a value's parts, each with its key, index or attribute name; ``None`` for a leaf."""
    if is_packed(value) or isinstance(value, _CLOSED):
        return None
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, (tuple, list, deque)):
        return list(enumerate(value))
    return _attributes(value)


def _attributes(value: Any) -> list[tuple[Any, Any]] | None:
    own = getattr(value, "__dict__", None)
    found = dict(own) if isinstance(own, dict) else {}
    slots = False
    for kind in type(value).__mro__:
        names = vars(kind).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            slots = True
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{kind.__name__.lstrip('_')}{name}"
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return list(found.items()) if isinstance(own, dict) or slots else None


def rebuilt(value: Any, parts: list[tuple[Any, Any]], copied: Any = None) -> Any:
    """Return what holds other parts than a value, and is of the same kind.

    Args:
        value: what `parts_of` takes apart.
        parts: as it returns them.
        copied: a copy of the value to be filled; ``None`` to make one.
    """
    if isinstance(value, tuple):
        made = [part for _, part in parts]
        return value._make(made) if hasattr(value, "_make") else type(value)(made)
    copied = copy.copy(value) if copied is None else copied
    for key, part in parts:
        if isinstance(value, (dict, list, deque)):
            copied[key] = part
        else:
            # Frozen dataclasses forbid setattr.
            object.__setattr__(copied, key, part)
    return copied
