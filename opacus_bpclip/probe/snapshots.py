"""Records of all that a model's modules hold, to see whether two passes have left the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from enum import Enum
from numbers import Number
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from opacus_bpclip.probe.buffers import buffers_of, numbers
from opacus_bpclip.probe.comparison import equal
from opacus_bpclip.probe.leaves import parts_of

_PLAIN = (Number, str, bytes, type(None), Enum, torch.dtype, torch.device)


class _Object(NamedTuple):
    """Something that is compared by identity."""

    value: Any


Snapshot = Sequence[Tensor | str | _Object]


def snapshot(model: nn.Module) -> Snapshot:
    """Return copies of all buffers and attributes of a model's modules.

    Containers are copied, too, and the attributes of plain objects, but no object in such an
    object. Parameters, functions and the like are compared by identity.
    """
    buffers = [x for own in buffers_of(model, copied=True).values() for x in own]
    return [*buffers, *_parts(model, {}, objects=1)]


def alike(one: Snapshot, other: Snapshot) -> bool:
    """Return whether two snapshots are equal, number by number."""
    return len(one) == len(other) and all(map(_alike, one, other))


def _alike(one: Tensor | str | _Object, other: Tensor | str | _Object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return equal([one], [other])
    if isinstance(one, _Object) and isinstance(other, _Object):
        return one.value is other.value
    return isinstance(one, str) and isinstance(other, str) and one == other


def _parts(value: Any, seen: dict[int, str], *, objects: int) -> Iterator[Tensor | str | _Object]:
    if isinstance(value, _PLAIN):
        yield f"{type(value)} {value!r}"
    elif id(value) in seen:
        yield seen[id(value)]
    elif isinstance(value, nn.Parameter):
        yield _Object(value)
    elif isinstance(value, Tensor):
        own = numbers(value)
        yield f"{type(value)} {value.layout} {len(own)}"
        # What cannot be compared is never alike.
        yield from (x.clone() for x in own) if own else [_Object(object())]
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield f"{value.dtype} {value.shape} {value.tobytes()!r}"
    else:
        seen[id(value)] = f"number {len(seen)}"
        inside: Any
        if isinstance(value, dict):
            inside = [part for pair in value.items() for part in pair]
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            inside = [*value]
        elif isinstance(value, nn.Module):
            inside = [vars(value)]
        elif objects and parts_of(value) is not None and hasattr(value, "__dict__"):
            inside, objects = [vars(value)], objects - 1
        else:
            yield _Object(value)
            return
        yield f"{type(value)} {len(inside)}"
        for part in inside:
            yield from _parts(part, seen, objects=objects)
