"""Batches for trial runs: made-up examples of the right shapes, and parts of a given batch.

The shapes and dtypes of a data set's examples are public. Their values are private, and a made-up
batch has none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from opacus_bpclip.model.recurrence import is_packed
from opacus_bpclip.probe.leaves import Change, batch_leaves, map_leaves, parts_of
from opacus_bpclip.probe.values import invented, mixed, rows_of

# Enough for `partitions` to put any two examples once together and once apart.
EXAMPLES = 4


class Batch(NamedTuple):
    """The arguments of one call of a model.

    Attributes:
        args: the positional arguments.
        kwargs: the keyword arguments.
        size: the number of examples.
        axis: the batch axis of a tensor.
        shared: the tensors that are known to hold no examples. With ``None``, each tensor whose
            batch axis has ``size`` entries holds examples.
        present: ``[B]`` bool, which rows are not padding; ``None`` for all.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: int
    axis: int
    shared: tuple[Tensor, ...] | None = None
    present: Tensor | None = None

    def holds_examples(self, leaf: object) -> bool:
        """Return whether a leaf of the arguments has one row for each example."""
        if self.shared is not None and any(leaf is known for known in self.shared):
            return False
        if is_packed(leaf):
            return len(leaf.batch_sizes) > 0 and int(leaf.batch_sizes[0]) == self.size
        return (
            isinstance(leaf, Tensor)
            and leaf.dim() > self.axis
            and leaf.shape[self.axis] == self.size
        )

    def map(self, change: Change) -> Batch:
        """Return a batch in which every leaf that holds examples is changed.

        A tensor that is passed twice is changed once, and the result is passed twice.
        """

        def visit(leaf: Any) -> Any:
            return change(leaf) if self.holds_examples(leaf) else leaf

        args, kwargs = map_leaves((self.args, self.kwargs), visit)
        return self._replace(args=args, kwargs=kwargs, shared=self.without_examples)

    @property
    def without_examples(self) -> tuple[Tensor, ...]:
        """Return the tensors that hold no examples."""
        return tuple(
            leaf
            for leaf in batch_leaves((self.args, self.kwargs))
            if isinstance(leaf, Tensor) and not self.holds_examples(leaf)
        )

    @property
    def with_examples(self) -> tuple[Tensor, ...]:
        """Return the tensors that hold examples."""
        return tuple(
            leaf
            for leaf in batch_leaves((self.args, self.kwargs))
            if isinstance(leaf, Tensor) and self.holds_examples(leaf)
        )

    @property
    def square(self) -> tuple[int, ...] | None:
        """Return the shape of a tensor that has as many rows as examples, but may hold none.

        So it is with one that has the same size on another axis, a mask over pairs of tokens.
        """
        shapes = (tuple(x.shape) for x in self.with_examples)
        return min((s for s in shapes if s.count(self.size) > 1), key=len, default=None)

    @property
    def shapes(self) -> object:
        """Return the shapes of the tensors that hold examples, without the batch axis."""
        axis = self.axis
        return tuple((*x.shape[:axis], *x.shape[axis + 1 :]) for x in self.with_examples)

    def select(self, rows: Sequence[int]) -> Batch:
        """Return the batch of these examples."""
        return self.map(lambda leaf: rows_of(leaf, rows, self.axis))._replace(size=len(rows))

    def without_padding(self) -> Batch:
        """Return the batch of the rows that are not padding."""
        if self.present is None:
            return self
        return self.select(self.present.nonzero().flatten().tolist())._replace(present=None)

    def hollow(self) -> Batch:
        """Return an empty batch; one made-up example with packed sequences, which are not empty."""
        packed = any(map(is_packed, batch_leaves((self.args, self.kwargs))))
        return self.invent(1) if packed else self.select(())._replace(present=None)

    def invent(self, count: int, *, seed: int = 0, scale: float = 1.0) -> Batch:
        """Return a batch of ``count`` made-up examples of the same shapes and dtypes.

        Floats are normal, times ``scale``. Integers are 0 or 1, which are valid ids in any table
        of two entries or more. Flags are random.
        """
        generator = torch.Generator().manual_seed(seed)

        def made_up(leaf: Any) -> Any:
            return invented(leaf, count, self.axis, scale, generator)

        return self.map(made_up)._replace(size=count)

    def swapped(self, kept: Sequence[int], *, seed: int) -> Batch:
        """Return the batch with other values for all examples except those kept.

        Floats are made up, larger than usual. Integers are taken from other examples, so that ids
        stay valid.
        """
        fresh = self.invent(self.size, seed=seed, scale=10.0)
        pairs = zip(
            batch_leaves((self.args, self.kwargs)),
            batch_leaves((fresh.args, fresh.kwargs)),
            strict=True,
        )
        others = {id(leaf): other for leaf, other in pairs if self.holds_examples(leaf)}

        def mix(leaf: Any) -> Any:
            other = others[id(leaf)]
            if not leaf.data.is_floating_point():
                other = rows_of(leaf, range(self.size)[::-1], self.axis)
            return mixed(leaf, other, kept, self.axis)

        return self.map(mix)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        """Return the batch on another device, real floats in another dtype."""

        shared, known = [], self.without_examples

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, (Tensor, PackedSequence)):
                return leaf
            moved: Any = leaf.to(device)  # type: ignore[arg-type]
            if leaf.data.is_floating_point() and dtype is not None:
                moved = moved.to(dtype)
            if any(leaf is own for own in known):
                shared.append(moved)
            return moved

        args, kwargs = map_leaves((self.args, self.kwargs), move)
        return self._replace(args=args, kwargs=kwargs, shared=tuple(shared))

    @property
    def signature(self) -> object:
        """Return a key that differs between calls that a model may treat differently."""
        return _outline((self.args, self.kwargs), ())


def _outline(value: Any, above: tuple[int, ...]) -> object:
    parts = parts_of(value)
    if parts is None:
        return _kind(value)
    if id(value) in above:
        return type(value)
    inside = [(str(key), _outline(part, (*above, id(value)))) for key, part in parts]
    if isinstance(value, list):
        # Texts and numbers in a list are one for each example: data, and not part of the key.
        plain = {type(part) for _, part in parts if not _is_row(part)}
        inside = [one for one, (_, part) in zip(inside, parts, strict=True) if _is_row(part)]
        return list, frozenset(plain), tuple(inside)
    return type(value), tuple(inside)


def _is_row(part: Any) -> bool:
    return is_packed(part) or isinstance(part, Tensor) or parts_of(part) is not None


def _kind(leaf: object) -> object:
    if is_packed(leaf):
        return "packed", leaf.data.dtype, leaf.data.dim()
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.dim()
    # Numbers may count steps; a flag or a name decides what the model does.
    return leaf if leaf is None or isinstance(leaf, (bool, str)) else type(leaf)
