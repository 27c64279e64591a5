"""Search autograd's graph for what a tensor was computed from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import Tensor
from torch.autograd.graph import Node

from opacus_bpclip.rules.precision import is_low


def leaves_of(y: Tensor, stop: Collection[Node | None] = ()) -> Iterator[Tensor]:
    """Yield each leaf tensor that ``y`` was computed from once.

    Args:
        y: the tensor; nothing is yielded if it is a leaf itself.
        stop: nodes at which the search stops.
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
    nodes: Iterable[Node | None],
    stop: Collection[Node | None] = (),
    is_low: Callable[[torch.dtype], bool] = is_low,
    *,
    scalars: bool = True,
) -> torch.dtype | None:
    """Return a low-precision dtype that gradients pass on their way from some nodes, if any.

    Args:
        nodes: the nodes where the gradients start.
        stop: nodes at which the search stops.
        is_low: says of a dtype whether it is one.
        scalars: whether gradients that are one number count, too.
    """
    waiting, seen = list(nodes), {None, *stop}
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for made in node._input_metadata:
            if is_low(made.dtype) and (scalars or made.shape):
                dtype: torch.dtype = made.dtype
                return dtype
        waiting += [before for before, _ in node.next_functions]
    return None
