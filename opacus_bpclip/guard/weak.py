"""Hooks of tensors that do not keep alive what they belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls a bound method for as long as its object lives.

    Python's garbage collector does not see what a post-accumulate hook of a tensor refers to. An
    object whose own method is a hook of a tensor that it holds would never be freed, nor would the
    model behind it. The object must outlive whatever the hook is to notice: a backward pass may
    come long after a forward pass has ended.
    """
    kept = WeakMethod(method)

    def call(*args: Any) -> Any:
        alive = kept()
        return None if alive is None else alive(*args)

    return call
