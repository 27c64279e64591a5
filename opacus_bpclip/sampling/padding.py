"""Rows of zeros that pad a batch to a public size: how they are added, and how they are recognised.

A row is padding if it is zero in all arguments of the model. This depends on the example alone, so
the loader need not pass any marks to the model. An example that consists of zeros only is also
taken for padding, and contributes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from opacus_bpclip.errors import CoverageError
from opacus_bpclip.model.recurrence import is_packed
from opacus_bpclip.probe.batches import Batch
from opacus_bpclip.probe.leaves import batch_leaves, batch_size, map_leaves, parts_of, rebuilt


def present_rows(args: tuple[Any, ...], kwargs: dict[str, Any], axis: int) -> Tensor:
    """Return which rows of a model's call are not padding, ``[B]`` bool.

    Args:
        args: the positional arguments.
        kwargs: the keyword arguments.
        axis: the batch axis of a tensor.

    Raises:
        CoverageError: no tensor holds examples.
    """
    present = None
    for tensor in _with_examples(args, kwargs, axis):
        # A nan is not zero.
        own = tensor.detach().movedim(axis, 0).unsqueeze(-1).flatten(1).any(dim=1)
        present = own if present is None else present | own.to(present.device)
    if present is None:
        raise CoverageError(
            "The model was called without a tensor that has one row for each example, so the rows "
            "that physical_batch_size has added cannot be recognised and would count as data. Pass "
            "the batch as tensors, and pack sequences inside the model."
        )
    return present


def _with_examples(args: tuple[Any, ...], kwargs: dict[str, Any], axis: int) -> Sequence[Tensor]:
    if torch.compiler.is_compiling():  # pragma: no cover (traced, unseen by coverage)
        # Simple enough for torch.compile to trace.
        found = [x for x in _tensors((args, kwargs)) if x.dim() > axis]
        return [x for x in found if x.shape[axis] == found[0].shape[axis]]
    size = batch_size(args, kwargs, axis)
    return () if size is None else Batch(args, kwargs, size, axis).with_examples


def _tensors(value: Any) -> list[Tensor]:  # pragma: no cover (traced, unseen by coverage)
    if isinstance(value, Tensor):
        return [value]
    parts: Iterable[Any] = ()
    if isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, (tuple, list)):
        parts = value
    return [x for part in parts for x in _tensors(part)]


def with_rows(value: Any, one: Any, two: Any, *, items: int, rows: int) -> Any:
    """Return a batch with more rows, or with none.

    Args:
        value: the batch.
        one: a batch of one item, of the same structure.
        two: a batch of that item twice. The axis that differs between the two is the batch axis.
        items: the number of items in the batch.
        rows: 0 for an empty batch, or at least ``items``: rows of zeros are added. A list gets
            more entries like the first item's, with zeros and empty strings.

    Raises:
        ValueError: a part of the batch does not have one row for each item.
    """

    def changed(part: Any, first: Any, second: Any) -> Any:
        return with_rows(part, first, second, items=items, rows=rows)

    if isinstance(one, Tensor):
        for axis, (size, other) in enumerate(zip(one.shape, two.shape, strict=True)):
            if size != other:
                return _resized(value, axis, items, rows)
        return value
    if type(one) is dict:
        return {key: changed(part, one[key], two[key]) for key, part in value.items()}
    if isinstance(one, list) and len(one) != len(two):
        _require_rows(len(value), items, "a list")
        return [*value[:rows], *(map_leaves(one[0], _zero) for _ in range(rows - items))]
    if type(one) in (list, tuple):
        return type(one)(changed(*parts) for parts in zip(value, one, two, strict=True))
    if parts_of(one) is None:
        if is_packed(one) and rows > items:
            raise ValueError(
                "The collate_fn makes a packed sequence, to which physical_batch_size cannot add "
                "sequences of length 0. Collate a padded tensor and the lengths, and pack inside "
                "the model, with lengths.clamp(min=1)."
            )
        return value
    leaves = [list(batch_leaves(batch)) for batch in (value, one, two)]
    if len({len(own) for own in leaves}) > 1:
        # It holds a list with an entry for each item.
        matched = zip(*(parts_of(batch) or () for batch in (value, one, two)), strict=True)
        return rebuilt(value, [(key, changed(a, b, c)) for (key, a), (_, b), (_, c) in matched])
    partners = {id(parts[0]): parts for parts in zip(*leaves, strict=True)}
    return map_leaves(value, lambda leaf: changed(*partners[id(leaf)]))


def _resized(x: Tensor, axis: int, items: int, rows: int) -> Tensor:
    if not rows:
        return x.narrow(axis, 0, 0).clone()
    _require_rows(x.shape[axis], items, f"a tensor of shape {tuple(x.shape)}")
    if rows == items:
        return x
    shape = (*x.shape[:axis], rows - items, *x.shape[axis + 1 :])
    return torch.cat([x, x.new_zeros(shape)], dim=axis)


def _require_rows(size: int, items: int, what: str) -> None:
    if size != items:
        raise ValueError(
            f"The collate_fn makes {what} with {size} rows of {items} items, so "
            "physical_batch_size cannot pad it to a constant number of rows. Make one row of "
            "each item, or leave physical_batch_size out."
        )


def _zero(leaf: Any) -> Any:
    """Return the padding for a number, a text or a tensor in a list."""
    if isinstance(leaf, Tensor):
        return torch.zeros_like(leaf)
    if isinstance(leaf, (bool, int, float, complex, str, bytes)):
        return type(leaf)()
    return leaf
