"""While a model is traced, record the form of its call, and make up examples of that form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from opacus_bpclip.clipping.budget import BUDGETS
from opacus_bpclip.guard.call_checks import number
from opacus_bpclip.guard.forms import NOT_SHOWN, form_of, shown
from opacus_bpclip.probe.batches import EXAMPLES, Batch
from opacus_bpclip.probe.leaves import batch_leaves, batch_size, map_leaves


def note_form(
    key: str, axis: int, training: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:  # pragma: no cover (traced, unseen by coverage)
    """Record how a model is called. This function is traced itself.

    Args:
        key: the key of the model's budget.
        axis: the batch axis of tensors.
        training: whether the model is in training mode.
        args: the positional arguments of the call.
        kwargs: the keyword arguments of the call.
    """
    _note(key, axis, training, shown(args), shown(kwargs))


@torch._dynamo.allow_in_graph
def _note(
    key: str, axis: int, training: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    args, kwargs = _unlocked(args), _unlocked(kwargs)
    budget = BUDGETS[key]
    form = form_of(training, args, kwargs)
    # Without the tracer's modes: these tensors must be real ones.
    with _disable_current_modes():
        args, kwargs = map_leaves((args, kwargs), _real)
        budget.rows = batch_size(args, kwargs, axis) or 0
        budget.forms.note_traced(form, _example_of(args, kwargs, axis))
    return torch.zeros(())


def _unlocked(value: Any) -> Any:
    """Replace the tracer's numbers, tuples, lists and dictionaries by Python's own."""
    if isinstance(value, torch.SymInt):
        return number(value)
    if isinstance(value, torch.SymFloat):
        return 1.0
    if isinstance(value, tuple):
        return tuple(map(_unlocked, value))
    if isinstance(value, list):
        return list(map(_unlocked, value))
    if isinstance(value, dict):
        return {name: _unlocked(part) for name, part in value.items()}
    return value


def _example_of(args: tuple[Any, ...], kwargs: dict[str, Any], axis: int) -> Batch | None:
    """Return made-up examples of these arguments' shapes; ``None`` if there can be none."""
    if any(isinstance(x, str) and x == NOT_SHOWN for x in batch_leaves((args, kwargs))):
        return None
    try:
        size = batch_size(args, kwargs, axis)
        return None if size is None else Batch(args, kwargs, size, axis).invent(EXAMPLES)
    except Exception:  # the arguments may be anything
        return None


def _real(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    shape = [number(size) for size in leaf.shape]
    return torch.zeros((), dtype=leaf.dtype, device=leaf.device).expand(shape)


def traced_rows(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], axis: int, present: Tensor | None
) -> Tensor | None:  # pragma: no cover (traced, unseen by coverage)
    """Return of how many examples a call is, a scalar; ``None`` where a graph does not show it.

    Args:
        args: by position.
        kwargs: by name.
        axis: which axis of a tensor is the batch.
        present: ``[B]`` bool, which rows are not padding; ``None`` for all.
    """
    if present is not None:
        return present.sum()
    waiting: list[Any] = [*args, *kwargs.values()]
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, Tensor):
            if value.dim() > axis:
                return torch.ones(value.shape[axis], device="cpu").sum()
        elif type(value) in (tuple, list):
            waiting = [*value, *waiting]
        elif type(value) is dict:
            waiting = [*value.values(), *waiting]
        elif value is not None and not isinstance(value, (bool, int, float, str)):
            return None
    return None
