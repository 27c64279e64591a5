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

# Functions that change their first argument in place, although their names do not end in "_".
_IN_PLACE = frozenset(
    {"__setitem__"}
    | {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow", "and", "or", "xor")}
)
# Files of PyTorch that a call passes through; they are not part of the model's code.
_THROUGH = ("overrides.py", "functional.py", "_tensor.py", "nn/functional.py", "utils")
_OWN_FILES = (
    f"{Path(__file__).parents[1]}{os.sep}",
    *(str(Path(torch.__file__).parent / file) for file in _THROUGH),
)

_MODULE_CALL = str(Path(torch.nn.Module.__init__.__code__.co_filename))


class Made(NamedTuple):
    """A tensor that was computed from parameters alone.

    Attributes:
        shown: the tensor that the model sees: a parameter, or the result of a function.
        value: the same tensor on a detached graph, whose leaves replace the parameters.
        names: the names of the parameters that it was computed from.
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
        spec: the tree structure of the arguments.
        made: by index, the arguments that were computed from parameters alone.
        site: the files and lines of the call, up to the module's forward.
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
        """Return whether the function changes its first argument in place."""
        name = self.name
        return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))

    @property
    def names(self) -> frozenset[str]:
        """Return the names of the parameters that the arguments were computed from."""
        return frozenset[str]().union(*(made.names for made in self.made.values()))

    @property
    def key(self) -> CallKey:
        """Return the key under which `Plan` finds the call's template."""
        kinds = tuple(
            (leaf.dim(), leaf.is_floating_point()) if isinstance(leaf, Tensor) else type(leaf)
            for leaf in self.leaves
        )
        return CallKey(self.name, self.names, tuple(self.made), kinds, self.site)

    def run(self, leaves: Sequence[Any]) -> Any:
        """Call the function on other arguments; an in-place function changes and returns a copy."""
        if not self.is_in_place:
            args, kwargs = pytree.tree_unflatten(leaves, self.spec)
            return self.func(*args, **kwargs)
        own = leaves[0].clone()
        args, kwargs = pytree.tree_unflatten([own, *leaves[1:]], self.spec)
        self.func(*args, **kwargs)
        return own

    def as_computed(self, results: list[Any], *, drawn: bool) -> list[Any]:
        """Return the results in the low precision that the model computes in, if it does.

        Args:
            results: the flattened results, in the precision of the gradients.
            drawn: whether the function draws random numbers. Then the results are rounded, not
                computed again, so that they belong to the same random numbers as the gradients.
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
            template: the places of the batch in arguments and results.
            rows: the example's rows of the arguments that hold the batch, in their order.
            values: the arguments computed from parameters alone, in the order of `made`.

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
    """Return the files and lines of the current call, up to the module's forward."""
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
