"""What a tensor was computed from, by autograd's graph."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor
from torch.autograd.graph import Node

from opacus_bpclip.rules.precision import is_low


def leaves_of(y: Tensor, stop: Collection[Node | None] = ()) -> Iterator[Tensor]:
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


def low_precision_behind(
    nodes: Iterable[Node | None], stop: Collection[Node | None] = ()
) -> torch.dtype | None:
    """Return the low precision that gradients go through on their way from some nodes, if any.

    Args:
        nodes: where they start.
        stop: the nodes that are not looked at.
    """
    waiting, seen = list(nodes), {None, *stop}
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for made in node._input_metadata:
            if is_low(made.dtype):
                dtype: torch.dtype = made.dtype
                return dtype
        waiting += [before for before, _ in node.next_functions]
    return None
