"""What a tensor was computed from, by autograd's graph."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor


def leaves_of(
    y: Tensor, stop: Collection[torch.autograd.graph.Node | None] = ()
) -> Iterator[Tensor]:
    """Yield the leaf tensors behind ``y``, each once.

    Args:
        y: the tensor; a leaf has none behind it.
        stop: the nodes that are not crossed.
    """
    if y.grad_fn is None:
        return
    queue, seen = [y.grad_fn], {*stop, y.grad_fn}
    while queue:
        for following, _ in queue.pop().next_functions:
            if following is None or following in seen:
                continue
            seen.add(following)
            leaf = getattr(following, "variable", None)
            if leaf is None:
                queue.append(following)
            else:
                yield leaf
