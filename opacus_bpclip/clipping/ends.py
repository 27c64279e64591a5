"""How many scopes of traced graphs end in one backward pass: each spends its budget once.

Inside a traced graph nothing can be counted. But each scope sends a 1 to a tensor, and autograd
adds up what a backward pass sends there. So two forward passes of a compiled model that join in one
loss are found, where each would use the whole of its budget for the same examples. Where batches
are filled up, it also sends how many rows it took for examples.
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
        note_rows: called with the number of rows, a scalar tensor.
        device: on which rows are counted.
    """

    def __init__(
        self,
        allowed: int,
        fail: Callable[[str], object],
        note_rows: Callable[[Tensor], object],
        device: torch.device,
    ) -> None:
        self._allowed, self._note_rows, self._fail = allowed, note_rows, fail
        self._device = device
        self._attach()

    def _attach(self) -> None:
        self._ends = torch.zeros((), requires_grad=True)
        self._ends.register_hook(self._arrive)
        self._rows = torch.zeros(2, requires_grad=True, device=self._device)
        self._rows.register_hook(self._arrive_rows)

    def tensors(self, *, with_rows: bool) -> tuple[Tensor, ...]:
        """Return what the scopes send to.

        Args:
            with_rows: whether they send how many rows they took for examples, too.
        """
        return (self._ends, self._rows) if with_rows else (self._ends,)

    def __getstate__(self) -> dict[str, object]:
        left = ("_ends", "_rows")
        return {name: value for name, value in vars(self).items() if name not in left}

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

    def _arrive_rows(self, found: Tensor | None) -> Tensor | None:
        if found is None:
            return None
        ends, rows = found
        # Several uses of a layer have the same rows.
        self._note_rows(rows / ends.clamp(min=1))
        return torch.zeros_like(found)
