"""Count the scopes of traced graphs that end in one backward pass.

Each scope spends its budget once, so two forward passes of a compiled model in one loss would spend
it twice for the same examples. Code inside a traced graph cannot count, but each scope sends a
gradient of 1 to a tensor, and autograd adds up these gradients. If batches are padded, the scope
also sends the number of rows that it treated as examples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opacus_bpclip.guard.passes import TWO_FORWARDS


class Ends:
    """The counters of one budget.

    Args:
        allowed: the number of scopes that may end in one backward pass.
        fail: raises an error with the given message.
        note_rows: called with the number of rows, a scalar tensor.
        device: the device on which rows are counted.
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
        """Return the tensors that the scopes send their counts to.

        Args:
            with_rows: whether the scopes also send the number of rows treated as examples.
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
            return None  # With a joint budget the layers' own counters receive no gradient.
        if int(count) > self._allowed:
            self._fail(TWO_FORWARDS)
        # Accumulate nothing in the tensor's grad.
        return torch.zeros_like(count)

    def _arrive_rows(self, found: Tensor | None) -> Tensor | None:
        if found is None:
            return None
        ends, rows = found
        # The mean: several uses of a layer have the same rows.
        self._note_rows(rows / ends.clamp(min=1))
        return torch.zeros_like(found)
