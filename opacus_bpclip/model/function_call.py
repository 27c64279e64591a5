"""One call of a function on parameters."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from opacus_bpclip.model.plan import CallKey, Site, Template
from opacus_bpclip.rules.precision import is_autocast, is_low

# Whose names do not end in an underscore, though they work on their first argument.
_IN_PLACE = frozenset(
    {"__setitem__"}
    | {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow", "and", "or", "xor")}
)
# Calls come through these.
_THROUGH = ("overrides.py", "functional.py", "_tensor.py", "nn/functional.py", "utils")
_OWN_FILES = (
    f"{Path(__file__).parents[1]}{os.sep}",
    *(str(Path(torch.__file__).parent / file) for file in _THROUGH),
)

_MODULE_CALL = str(Path(torch.nn.Module.__init__.__code__.co_filename))


class Made(NamedTuple):
    """What was computed from parameters alone.

    Attributes:
        shown: the tensor that the model has: a parameter, or what a function returned.
        value: the same on the private graph, whose leaves stand for the parameters.
        names: of the parameters behind it.
    """

    shown: Tensor
    value: Tensor
    names: frozenset[str]


@dataclass
class FunctionCall:
    """One call of a function.

    Attributes:
        func: the function.
        leaves: its flattened arguments.
        spec: how to put them together.
        made: by index, those that were computed from parameters alone.
        site: the files and the lines that call it, up to the module's forward.
    """

    func: Callable[..., Any]
    leaves: list[Any]
    spec: pytree.TreeSpec
    made: Mapping[int, Made]
    site: Site = ()

    @property
    def name(self) -> str:
        """Return the function's name."""
        return str(getattr(self.func, "__name__", self.func))

    @property
    def is_in_place(self) -> bool:
        """Return whether it works on its first argument."""
        name = self.name
        return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))

    @property
    def names(self) -> frozenset[str]:
        """Return the parameters behind it."""
        return frozenset[str]().union(*(made.names for made in self.made.values()))

    @property
    def key(self) -> CallKey:
        """Return what two calls have in common that take up the batch alike."""
        kinds = tuple(
            (leaf.dim(), leaf.is_floating_point()) if isinstance(leaf, Tensor) else type(leaf)
            for leaf in self.leaves
        )
        return CallKey(self.name, self.names, tuple(self.made), kinds, self.site)

    def run(self, leaves: Sequence[Any]) -> Any:
        """Call the function on other arguments; in place it works on a copy, which is returned."""
        if not self.is_in_place:
            args, kwargs = pytree.tree_unflatten(leaves, self.spec)
            return self.func(*args, **kwargs)
        own = leaves[0].clone()
        args, kwargs = pytree.tree_unflatten([own, *leaves[1:]], self.spec)
        self.func(*args, **kwargs)
        return own

    def as_computed(self, results: list[Any], *, drawn: bool) -> list[Any]:
        """Return the results as the model has them, where that computes in low precision.

        Args:
            results: in the precision of gradients, flattened.
            drawn: whether the function draws numbers. Then the results are those of the numbers
                whose gradients are made.
        """
        tensors = (x for x in self.leaves if isinstance(x, Tensor))
        if not (is_autocast() or any(is_low(x.dtype) for x in tensors)):
            return results
        with torch.no_grad(), torch.random.fork_rng(enabled=drawn):
            computed = pytree.tree_leaves(self.run(self.leaves))
        if not drawn:
            return computed
        return [
            x.to(y.dtype) if isinstance(x, Tensor) else x
            for x, y in zip(results, computed, strict=True)
        ]

    def of_example(
        self, template: Template, rows: Iterable[Tensor], values: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Call the function on one example.

        Args:
            template: where the batch is.
            rows: of the arguments that hold the batch, in their order.
            values: what was computed from parameters alone, in the order of `made`.

        Returns:
            The flattened results that have a row for each example.
        """
        leaves, own = list(self.leaves), iter(rows)
        for index, place in enumerate(template.arguments):
            if place is not None:
                leaf = leaves[index]
                counted = not isinstance(leaf, Tensor)
                leaves[index] = place.entries if counted else next(own)
        for index, value in zip(self.made, values, strict=True):
            leaves[index] = value
        results = pytree.tree_leaves(self.run(leaves))
        return tuple(
            result
            for result, place in zip(results, template.outputs, strict=True)
            if place is not None
        )


def site_of_call() -> Site:
    """Return the lines of the code that calls a function, from the module's forward to the call."""
    found = []
    frame = sys._getframe(1)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if file == _MODULE_CALL:
            break
        if not file.startswith(_OWN_FILES):
            found.append((file, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)
