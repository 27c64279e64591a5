"""How many scopes of traced graphs end in one backward pass: each spends its budget once.

Inside a traced graph nothing can be counted. But each scope sends a 1 to a tensor, and autograd
adds up what a backward pass sends there. So two forward passes of a compiled model that join in one
loss are found, where each would use the whole of its budget for the same examples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opacus_bpclip.guard.passes import TWO_FORWARDS


class Ends:
    """Counts for one budget.

    Args:
        allowed: how many scopes may end in one backward pass.
        fail: called with what is wrong; raises.

    Attributes:
        tensor: what the scopes send to.
    """

    def __init__(self, allowed: int, fail: Callable[[str], object]) -> None:
        self._allowed, self._fail = allowed, fail
        self._attach()

    def _attach(self) -> None:
        self.tensor = torch.zeros((), requires_grad=True)
        self.tensor.register_hook(self._arrive)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "tensor"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._attach()

    def _arrive(self, count: Tensor | None) -> Tensor | None:
        if count is None:
            return None  # A layer's, where all share one budget.
        if int(count) > self._allowed:
            self._fail(TWO_FORWARDS)
        # What is accumulated does not count.
        return torch.zeros_like(count)
