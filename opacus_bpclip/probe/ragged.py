"""Ragged batches: padding masks and ignored labels keep other numbers of each example's positions.

A loss that divides by the number of positions that count in the whole batch is not a mean over
examples. The difference shows only if this number differs between the examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from opacus_bpclip.probe.batches import Batch
from opacus_bpclip.probe.forms import argument_name
from opacus_bpclip.probe.leaves import Path, batch_leaves, named_leaves
from opacus_bpclip.probe.values import kept_positions, position_axis

# The labels of ignored positions: in PyTorch and Hugging Face, in older code, in label images.
_IGNORED = (-100, -1)
_IGNORED_IN_IMAGES = 255

# A batch with more tensors of integers is rarely one of labels: they are columns of a table.
_MOST_LABELS = 8


class Labels(NamedTuple):
    """A tensor of the batch that may hold ignored positions.

    Attributes:
        leaf: the tensor.
        values: the values that may mark an ignored position.
    """

    leaf: Tensor
    values: tuple[int, ...]


def padded(batch: Batch) -> Batch | None:
    """Return the batch with all integers and flags 0 from some position on, another one for each.

    So padding masks and loss masks keep different numbers of positions. The first position is 1,
    since a mask must leave a position to attend to, in causal attention, too. ``None`` if no such
    tensor has several positions for each example.
    """
    if not any(_has_positions(leaf, batch) for _, leaf in _leaves(batch)):
        return None

    def pad(leaf: Any) -> Any:
        if not _has_positions(leaf, batch):
            return leaf
        along = position_axis(leaf, batch.axis)
        assert along is not None
        ended = leaf * kept_positions(leaf, batch.axis).to(leaf.dtype)
        return ended.index_fill(along, torch.zeros(1, dtype=torch.long, device=leaf.device), 1)

    return batch.map(pad)


def counted(batch: Batch, model: nn.Module, *, accelerated: bool) -> Batch | None:
    """Return the batch with 1 and 2 in turn where an example has one integer, perhaps its length.

    Sequences of length 0 cannot be packed, and equal lengths leave the order as it is. On an
    accelerator an invalid index makes the device unusable for the process, so there only arguments
    that are named as lengths are changed. ``None`` if there is nothing to change.
    """
    lengths: dict[int, Tensor] = {}
    labels: set[int] = set()
    for path, leaf in _leaves(batch):
        single = _is_integral(leaf) and leaf.dtype != torch.bool and batch.holds_examples(leaf)
        if single and position_axis(leaf, batch.axis) is None:
            name = _name(model, path).lower()
            if "len" in name or not accelerated:
                lengths[id(leaf)] = leaf
            if "label" in name or "target" in name:
                labels.add(id(leaf))
    chosen = lengths.keys() - labels

    def count(leaf: Any) -> Any:
        if id(leaf) not in chosen:
            return leaf
        shape = [1] * leaf.dim()
        shape[batch.axis] = batch.size
        return (torch.arange(batch.size, device=leaf.device) % 2 + 1).view(shape).to(leaf.dtype)

    return batch.map(count) if chosen else None


def ended(batch: Batch) -> Batch:
    """Return the batch with sequences of vectors zero from some position on, other for each."""

    def end(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.dim() < 3:
            return leaf
        along = 1 if batch.axis == 0 else 0
        return leaf * kept_positions(leaf, batch.axis, along).to(leaf.dtype)

    return batch.map(end)


def hidden(batch: Batch) -> Batch | None:
    """Return the batch with all integers and flags of every second example 0, as if masked out.

    ``None`` if no such tensor has several positions for each example.
    """
    if not any(_has_positions(leaf, batch) for _, leaf in _leaves(batch)):
        return None

    def hide(leaf: Any) -> Any:
        if not _has_positions(leaf, batch):
            return leaf
        shape = [1] * leaf.dim()
        shape[batch.axis] = batch.size
        shown = torch.arange(batch.size, device=leaf.device) % 2
        return leaf * shown.view(shape).to(leaf.dtype)

    return batch.map(hide)


def of_several_lengths(batch: Batch, model: nn.Module, *, accelerated: bool) -> Iterator[Batch]:
    """Yield the batch with some examples shortened, in each way that changes it but `padded`."""
    counted_batch = counted(batch, model, accelerated=accelerated)
    if counted_batch is not None:
        yield counted_batch
    ended_batch = ended(batch)
    pairs = zip(batch.with_examples, ended_batch.with_examples, strict=True)
    if any(x is not y for x, y in pairs):
        yield ended_batch
    hidden_batch = hidden(batch)
    if hidden_batch is not None:
        yield hidden_batch


def ignoring(batch: Batch, labels: Tensor, value: int) -> Batch:
    """Return the batch with positions of one tensor ignored, another number for each example.

    Args:
        batch: the batch; its other tensors stay as they are.
        labels: the tensor.
        value: the label of an ignored position.
    """
    keep = kept_positions(labels, batch.axis)

    def ignore(leaf: Any) -> Any:
        return leaf.where(keep, value) if leaf is labels else leaf

    return batch.map(ignore)


def possible_labels(
    model: nn.Module, batch: Batch, *, accelerated: bool, known: Iterable[int] = ()
) -> Iterator[Labels]:
    """Yield the tensors of integers that may hold ignored positions.

    The search then tries them. An embedding raises an error for -100 on the CPU, but on an
    accelerator it may make the device unusable for the process, so there only arguments that are
    named as labels or targets are tried. Arguments that are named as masks hold 0 and 1, and are
    left out.

    Args:
        model: the model, for the names of its arguments.
        batch: the batch.
        accelerated: whether the model is on an accelerator.
        known: the labels that the model's losses ignore, from `IgnoredIndices`.
    """
    ways: dict[int, tuple[Tensor, list[str]]] = {}
    for path, leaf in _leaves(batch):
        if _has_positions(leaf, batch) and leaf.dtype != torch.bool:
            ways.setdefault(id(leaf), (leaf, []))[1].append(_name(model, path))
    for leaf, names in list(ways.values())[:_MOST_LABELS]:
        masks = all(name.endswith("mask") for name in names)
        named = all("label" in name or "target" in name for name in names)
        if not masks and (named or not accelerated):
            values = _IGNORED if leaf.dtype.is_signed else ()
            images = (_IGNORED_IN_IMAGES,) if leaf.dim() > 2 and leaf.dtype != torch.int8 else ()
            largest = torch.iinfo(leaf.dtype).max
            read = tuple(value for value in known if 0 <= value <= largest)
            yield Labels(leaf, tuple(dict.fromkeys(values + images + read)))


class IgnoredIndices(TorchDispatchMode):
    """Records the ``ignore_index`` of the model's losses, such as a tokenizer's padding id.

    Attributes:
        values: the labels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        names = [argument.name for argument in func._schema.arguments]
        ignored = (dict(zip(names, args, strict=False)) | kwargs).get("ignore_index")
        if isinstance(ignored, int):
            self.values.add(ignored)
        return func(*args, **kwargs)


class NegativeIndices(TorchDispatchMode):
    """Raises for an index or a target below zero, before the device's kernel is called with it.

    Args:
        ignored: the target that a loss may ignore.

    Raises:
        IndexError: an operation has such an argument.
    """

    def __init__(self, ignored: int) -> None:
        super().__init__()
        self._ignored = ignored

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        for name in ("index", "indices", "target"):
            values = filter(_is_integral, batch_leaves(given.get(name)))
            negative = any(value.numel() and int(value.min()) < 0 for value in values)
            if negative and given.get("ignore_index") != self._ignored:
                raise IndexError(f"{name} out of range in {func._schema.name}")
        return func(*args, **kwargs)


def _leaves(batch: Batch) -> Iterator[tuple[Path, Any]]:
    yield from named_leaves((batch.args, batch.kwargs))


def _is_integral(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not (leaf.is_floating_point() or leaf.is_complex())


def _has_positions(leaf: Any, batch: Batch) -> bool:
    return (
        _is_integral(leaf)
        and batch.holds_examples(leaf)
        and position_axis(leaf, batch.axis) is not None
    )


def _name(model: nn.Module, path: Path) -> str:
    side, key, *inner = path
    if inner:
        return str(inner[-1])
    return argument_name(model, key) if side == 0 else str(key)
