"""Batches to try a model on: made-up ones of the right shapes, and parts of a given one.

The shapes and dtypes of a data set's examples are public; their values are not, and no made-up
batch holds any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    unpack_sequence,
)
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import DataLoader, IterableDataset

from opacus_bpclip.probe.randomness import repeatable
from opacus_bpclip.recurrence import is_packed

# Two halves and two more pairs: each example meets each other one, and misses it.
EXAMPLES = 4

Change = Callable[[Any], Any]


class Batch(NamedTuple):
    """The arguments of one call of a model.

    Attributes:
        args: by position.
        kwargs: by name.
        size: how many examples they hold.
        axis: which axis of a tensor is the batch.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: int
    axis: int

    def holds_examples(self, leaf: object) -> bool:
        """Return whether a leaf of the arguments has one row for each example."""
        if is_packed(leaf):
            return len(leaf.batch_sizes) > 0 and int(leaf.batch_sizes[0]) == self.size
        return (
            isinstance(leaf, Tensor)
            and leaf.dim() > self.axis
            and leaf.shape[self.axis] == self.size
        )

    def map(self, change: Change) -> Batch:
        """Return the batch with every leaf that holds examples changed."""

        def visit(leaf: Any) -> Any:
            return change(leaf) if self.holds_examples(leaf) else leaf

        args, kwargs = map_leaves((self.args, self.kwargs), visit)
        return self._replace(args=args, kwargs=kwargs)

    def select(self, rows: Sequence[int]) -> Batch:
        """Return the batch of these examples."""
        return self.map(lambda leaf: _rows(leaf, rows, self.axis))._replace(size=len(rows))

    def invent(self, count: int, *, seed: int = 0, scale: float = 1.0) -> Batch:
        """Return a batch of ``count`` made-up examples of the same shapes and dtypes.

        Floats are normal, times ``scale``. Integers are 0 and 1, which are ids of whatever has two
        of them, and flags are drawn.
        """
        generator = torch.Generator().manual_seed(seed)

        def made_up(leaf: Any) -> Any:
            return _invented(leaf, count, self.axis, scale, generator)

        return self.map(made_up)._replace(size=count)

    def swapped(self, kept: Sequence[int], *, seed: int) -> Batch:
        """Return the batch with other values for all examples but those kept.

        Floats are made up, larger than usual. Integers are taken from other examples, where they
        are ids of something that exists.
        """
        others = self.invent(self.size, seed=seed, scale=10.0)
        fresh = iter(list(leaves((others.args, others.kwargs))))

        def mix(leaf: Any) -> Any:
            other = next(fresh)
            if not self.holds_examples(leaf):
                return leaf
            if not leaf.data.is_floating_point():
                other = _rows(leaf, range(self.size)[::-1], self.axis)
            return _mixed(leaf, other, kept, self.axis)

        args, kwargs = map_leaves((self.args, self.kwargs), mix)
        return self._replace(args=args, kwargs=kwargs)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        """Return the batch on another device, real floats in another dtype."""

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, (Tensor, PackedSequence)):
                return leaf
            moved: Any = leaf.to(device)  # type: ignore[arg-type]
            floating = leaf.data.is_floating_point()
            return moved.to(dtype) if floating and dtype is not None else moved

        args, kwargs = map_leaves((self.args, self.kwargs), move)
        return self._replace(args=args, kwargs=kwargs)

    @property
    def signature(self) -> object:
        """Return what tells calls apart that a model may treat in different ways."""
        flat, structure = tree_flatten((self.args, self.kwargs), is_leaf=is_packed)
        return str(structure), tuple(_kind(leaf) for leaf in flat)


def made_up_batches(loader: object, *, batch_first: bool = True) -> Iterator[Batch]:
    """Yield made-up batches in the forms in which a loop over ``loader`` may call its model.

    Shapes and dtypes are those of the data set's first example, collated; the values are made up.
    None is yielded where there is no first example to look at.
    """
    axis = 0 if batch_first else 1
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return
    try:
        with repeatable(torch.device("cpu")):
            # Augmentation may draw random numbers; they are put back.
            collated = loader.collate_fn([loader.dataset[0]] * EXAMPLES)
    except Exception:
        # Somebody else's code, which training will run and report; nothing to look at here.
        return
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    if isinstance(collated, Mapping):
        calls = [((), dict(collated)), ((collated,), {})]
    elif isinstance(collated, (tuple, list)) and collated:
        calls = [((collated[0],), {}), (tuple(collated), {})]
    else:
        calls = [((collated,), {})]
    for args, kwargs in calls:
        yield Batch(args, kwargs, EXAMPLES, axis).invent(EXAMPLES)


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's inputs belong."""
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def map_leaves(value: Any, change: Change) -> Any:
    """Change every leaf of tuples, lists, dicts, dataclasses and what torch knows besides."""

    def visit(leaf: Any) -> Any:
        if is_dataclass(leaf) and not isinstance(leaf, type):
            own = {f.name: getattr(leaf, f.name) for f in fields(leaf) if f.init}
            return replace(leaf, **map_leaves(own, change))
        return change(leaf)

    return tree_map(visit, value, is_leaf=is_packed)


def leaves(value: Any) -> Iterator[Any]:
    """Return the leaves that `map_leaves` would change, in its order."""
    found: list[Any] = []
    map_leaves(value, found.append)
    return iter(found)


def _rows(leaf: Any, rows: Sequence[int], axis: int) -> Any:
    if is_packed(leaf):
        sequences = unpack_sequence(leaf)
        return pack_sequence([sequences[row] for row in rows], enforce_sorted=False)
    return leaf.index_select(axis, torch.tensor(rows, device=leaf.device))


def _invented(leaf: Any, count: int, axis: int, scale: float, generator: torch.Generator) -> Any:
    if is_packed(leaf):
        # Of equal length: how long the examples are is not a question of shapes.
        longest = len(leaf.batch_sizes)
        data = _drawn((count, longest, *leaf.data.shape[1:]), leaf.data, scale, generator)
        return pack_padded_sequence(data, torch.tensor([longest] * count), batch_first=True)
    shape = (*leaf.shape[:axis], count, *leaf.shape[axis + 1 :])
    return _drawn(shape, leaf, scale, generator)


def _drawn(
    shape: tuple[int, ...], like: Tensor, scale: float, generator: torch.Generator
) -> Tensor:
    if like.is_floating_point() or like.is_complex():
        dtype = torch.complex64 if like.is_complex() else torch.float32
        drawn = scale * torch.randn(shape, generator=generator, dtype=dtype)
    else:
        drawn = torch.randint(2, shape, generator=generator)
    return drawn.to(like)


def _mixed(leaf: Any, other: Any, kept: Sequence[int], axis: int) -> Any:
    if is_packed(leaf):
        pairs = enumerate(zip(unpack_sequence(leaf), unpack_sequence(other), strict=True))
        rows = [own if row in kept else fresh[: len(own)] for row, (own, fresh) in pairs]
        return pack_sequence(rows, enforce_sorted=False)
    index = torch.tensor(kept, device=leaf.device)
    return other.index_copy(axis, index, leaf.index_select(axis, index))


def _kind(leaf: object) -> object:
    if is_packed(leaf):
        return "packed", leaf.data.dtype, leaf.data.dim()
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.dim()
    # Numbers may count steps; a flag or a name decides what the model does.
    return leaf if leaf is None or isinstance(leaf, (bool, str)) else type(leaf)
