"""Closed forms of per-example gradients for sums, products, normalisations and copies.

They save time. The trial on made-up examples compares them with autograd's gradients, one example
at a time, as it does for any other function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from opacus_bpclip.model.function_call import FunctionCall
from opacus_bpclip.model.plan import Template

# Takes some examples' rows of the arguments and of the upstream gradient. Returns the examples'
# gradients of the arguments in `FunctionCall.made`, in that order.
Known = Callable[[Sequence[Tensor], Tensor], tuple[Tensor, ...]]


def known_gradients(call: FunctionCall, template: Template) -> Known | None:
    """Return the closed form for a call, ``None`` if there is none.

    Args:
        call: the call, with its arguments.
        template: the places of the batch in arguments and results.
    """
    make = _FORMS.get(call.name)
    return None if make is None else make(call, template)


def summed_to(g: Tensor, shape: torch.Size) -> Tensor:
    """Sum each row of ``g``, ``[B, *]``, to ``shape``, which was broadcast to the row's shape."""
    extra = g.dim() - 1 - len(shape)
    axes = [*range(1, 1 + extra)]
    axes += [
        1 + extra + axis
        for axis, size in enumerate(shape)
        if size == 1 and g.shape[1 + extra + axis] != 1
    ]
    return (g.sum(dim=axes) if axes else g).reshape(len(g), *shape)


def _values(call: FunctionCall) -> list[Tensor]:
    return [call.leaves[index] for index in call.made]


def _is_of_two(call: FunctionCall) -> bool:
    return len(call.leaves) == 2 and len(call.made) == 1


def _sum(call: FunctionCall, template: Template) -> Known | None:
    if not _is_of_two(call):
        return None
    (value,) = _values(call)
    return lambda rows, g: (summed_to(g, value.shape),)


def _product(call: FunctionCall, template: Template) -> Known | None:
    (index,) = tuple(call.made)[:1]
    if not _is_of_two(call) or template.arguments[1 - index] is None:
        return None
    (value,) = _values(call)
    return lambda rows, g: (summed_to(g * rows[0], value.shape),)


def _copies(call: FunctionCall, template: Template) -> Known | None:
    if tuple(call.made) != (0,):
        return None
    (value,) = _values(call)
    return lambda rows, g: (summed_to(g, value.shape),)


def _given(call: FunctionCall, names: Sequence[str]) -> Mapping[str, Any]:
    """Return, by name, the index of each argument among the flattened arguments."""
    args, kwargs = pytree.tree_unflatten(list(range(len(call.leaves))), call.spec)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _normalization(
    names: Sequence[str], option: str, normalize: Callable[..., Tensor]
) -> Callable[[FunctionCall, Template], Known | None]:
    def make(call: FunctionCall, template: Template) -> Known | None:
        where = _given(call, names)
        owners = {where.get(name): name for name in ("weight", "bias")}
        if any(index not in owners for index in call.made) or where["input"] in call.made:
            return None
        if template.arguments[where["input"]] is None:
            return None
        shape_or_groups = pytree.tree_map(lambda index: call.leaves[index], where[option])
        eps = call.leaves[where["eps"]] if "eps" in where else None
        shapes = [value.shape for value in _values(call)]
        channels = 2 if option == "num_groups" else None

        def of(rows: Sequence[Tensor], g: Tensor) -> tuple[Tensor, ...]:
            x = rows[0]
            flat = x.flatten(0, 1)
            found = []
            for index, shape in zip(call.made, shapes, strict=True):
                own = g
                if owners[index] == "weight":
                    own = g * normalize(flat, shape_or_groups, eps).view_as(x)
                if channels is not None:
                    # Move the channels behind the positions, which are summed.
                    own = own.transpose(1, channels).flatten(2).sum(dim=2)
                found.append(summed_to(own, shape))
            return tuple(found)

        return of

    return make


def _layer_norm(x: Tensor, shape: Any, eps: float | None) -> Tensor:
    return F.layer_norm(x, shape, eps=1e-5 if eps is None else eps)


def _group_norm(x: Tensor, groups: int, eps: float | None) -> Tensor:
    return F.group_norm(x, groups, eps=1e-5 if eps is None else eps)


def _rms_norm(x: Tensor, shape: Any, eps: float | None) -> Tensor:
    return F.rms_norm(x, shape, eps=eps)


_SUMS = ("add", "__add__", "__radd__", "add_", "__iadd__")
_COPIES = ("expand", "expand_as", "broadcast_to")
# Functions whose gradients do not depend on the values of their arguments.
SUMS_AND_COPIES = frozenset((*_SUMS, *_COPIES))

_FORMS: dict[str, Callable[[FunctionCall, Template], Known | None]] = {
    **dict.fromkeys(_SUMS, _sum),
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply"), _product),
    **dict.fromkeys(_COPIES, _copies),
    "layer_norm": _normalization(
        ("input", "normalized_shape", "weight", "bias", "eps"), "normalized_shape", _layer_norm
    ),
    "rms_norm": _normalization(
        ("input", "normalized_shape", "weight", "eps"), "normalized_shape", _rms_norm
    ),
    "group_norm": _normalization(
        ("input", "num_groups", "weight", "bias", "eps"), "num_groups", _group_norm
    ),
}
