"""Read the inputs of a rule from a layer's call, and move the batch to the first axis."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from typing_extensions import Self

from opacus_bpclip.model.places import Place
from opacus_bpclip.model.views import FoldViews
from opacus_bpclip.rules import Inputs, Rule

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@dataclass(frozen=True)
class CallArguments:
    """The arguments of a layer's call that are the inputs of its rule.

    Attributes:
        names: the names of the first arguments of the layer's forward.
        batch_axis: the batch axis of these arguments.
        fold: the module that folds several rows of each example into the batch; ``None`` if an
            example has one row.
    """

    names: tuple[str, ...]
    batch_axis: int
    fold: FoldViews | None = None

    @classmethod
    def of(
        cls, module: nn.Module, rule: Rule, batch_axis: int, fold: FoldViews | None = None
    ) -> Self:
        """Read the names from the signature of the layer's forward."""
        _, *names = inspect.signature(type(module).forward).parameters
        return cls(tuple(names[: rule.arguments]), batch_axis, fold)

    @property
    def place(self) -> Place:
        """Return the place of the batch in a tensor, in the fold's present mode."""
        return Place(self.batch_axis, 1 if self.fold is None else self.fold.rows)

    def passed(self, args: Args, kwargs: Kwargs) -> Inputs:
        """Return the inputs of a call, in the layer's own layout.

        Raises:
            TypeError: the first one is missing.
        """
        inputs = args[: len(self.names)]
        if len(inputs) < len(self.names):
            inputs += tuple(kwargs.get(name) for name in self.names[len(inputs) :])
        if inputs[0] is None:
            raise TypeError(f"The layer was called without {self.names[0]!r}.")
        return inputs

    def get(self, args: Args, kwargs: Kwargs) -> Inputs:
        """Return the inputs of a call, batch first."""
        inputs = self.passed(args, kwargs)
        if self.batch_axis == 0 and self.fold is None:
            return inputs
        return tuple(x if x is None else self.rows(x) for x in inputs)

    def put(self, args: Args, kwargs: Kwargs, inputs: Inputs) -> tuple[Args, Kwargs]:
        """Return the arguments of a call with other inputs, given batch first."""
        passed = tuple(x if x is None else self.as_passed(x) for x in inputs)
        return self.replaced(args, kwargs, passed)

    def replaced(self, args: Args, kwargs: Kwargs, passed: Inputs) -> tuple[Args, Kwargs]:
        """Return the arguments of a call with other inputs, given in the layer's own layout."""
        positional, named = list(args), dict(kwargs)
        for index, (name, value) in enumerate(zip(self.names, passed, strict=True)):
            if index < len(args):
                positional[index] = value
            elif name in kwargs or value is not None:
                named[name] = value
        return tuple(positional), named

    def count(self, x: Tensor) -> int:
        """Return how many rows of each example a tensor has, in the fold's present mode."""
        if self.fold is None or self.batch_axis >= x.dim():
            return 1
        # The guard refuses another number of rows than the fold makes.
        return self.fold.rows if x.shape[self.batch_axis] % self.fold.rows == 0 else 1

    def rows(self, x: Tensor, count: int | None = None) -> Tensor:
        """Move a tensor's batch to the first axis: ``[B, ...]``, in a fold ``[B, K, ...]``.

        Args:
            x: a tensor in the layer's own layout.
            count: what `count` was in the forward pass that it belongs to; ``None`` asks now.
        """
        if self.batch_axis >= x.dim():
            return x  # The guard refuses tensors with too few axes, with the layer's name.
        count = self.count(x) if count is None else count
        x = x.movedim(self.batch_axis, 0) if self.batch_axis else x
        return x if self.fold is None else x.unflatten(0, (x.shape[0] // count, count))

    def as_passed(self, x: Tensor) -> Tensor:
        """Undo `rows`."""
        x = x if self.fold is None else x.flatten(0, 1)
        return x.movedim(0, self.batch_axis) if self.batch_axis else x


@contextmanager
def parameters_replaced(module: nn.Module, tensors: Mapping[str, Tensor | None]) -> Iterator[None]:
    """Replace some of a module's own parameters by other tensors inside this context."""
    before = dict(module._parameters)
    module._parameters.update(cast("Mapping[str, nn.Parameter | None]", tensors))
    try:
        yield
    finally:
        module._parameters.update(before)
