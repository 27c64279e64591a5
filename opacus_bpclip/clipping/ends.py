"""How often traced graphs spend a layer's budget in one backward pass.

Inside a traced graph nothing can be counted. But each of the layer's scopes sends a 1 to a tensor,
and autograd adds up what a backward pass sends there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opacus_bpclip.guard.passes import TWO_FORWARDS


class Ends:
    """Counts for one layer.

    Args:
        allowed: how many scopes may end in one backward pass.
        fail: called with what is wrong; raises.

    Attributes:
        counter: what the scopes send to.
    """

    def __init__(self, allowed: int, fail: Callable[[str], object]) -> None:
        self._allowed, self._fail = allowed, fail
        self._attach()

    def _attach(self) -> None:
        self.counter = torch.zeros((), requires_grad=True)
        self.counter.register_hook(self._arrive)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "counter"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._attach()

    def _arrive(self, count: Tensor | None) -> Tensor | None:
        if count is None:
            return None
        if int(count) > self._allowed:
            self._fail(TWO_FORWARDS)
        # What is accumulated does not count.
        return torch.zeros_like(count)
