"""Of which forward passes the gradients of traced graphs are, and of how many rows.

Inside a traced graph nothing can be counted. But each forward pass has a token, an input of every
scope in it, and the token's backward function runs once, whatever the number of scopes. There it
sends a 1 to a tensor, and how many rows it took for examples to another; autograd adds up what a
backward pass sends. So two forward passes that join in one loss are found, also where a layer may
be used as often as both of them use it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opacus_bpclip.guard.guard import GradientGuard
from opacus_bpclip.rules.first_order import first_order

_RAN_TWICE = (
    "The backward pass ran twice for one forward pass of a compiled model: its examples would "
    "contribute twice. Add the losses and call backward once; with several batches, call backward "
    "after each forward pass."
)


class ForwardPasses:
    """The tokens of one model's forward passes.

    Args:
        guard: watches the model, and hears of what is sent.
        device: of the model. What is counted there is not waited for.

    Attributes:
        token: of the forward pass at hand; ``None`` outside of one.
    """

    def __init__(self, guard: GradientGuard, device: torch.device) -> None:
        self._guard, self._device = guard, device
        self._attach()

    def _attach(self) -> None:
        self.token: Tensor | None = None
        # Only ever set while a graph is traced: to read it there would compile the graph anew.
        self._ran = False
        self._count = torch.zeros((), requires_grad=True, device="cpu")
        self._count.register_hook(self._arrive)
        self._rows, self._rows_there = (
            torch.zeros((), requires_grad=True, device=device) for device in ("cpu", self._device)
        )
        for rows in (self._rows, self._rows_there):
            rows.register_hook(self._arrive_rows)

    def __getstate__(self) -> dict[str, object]:
        left = ("token", "_count", "_rows", "_rows_there")
        return {name: value for name, value in vars(self).items() if name not in left}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._attach()

    def open(self) -> None:
        """Begin a forward pass in eager mode; parts of it may be graphs."""
        begin, guard, spent = self._guard.begin_backward(), self._guard, False

        def arrive(gradient: Tensor) -> Tensor:
            nonlocal spent
            begin()
            if spent and not guard.idle:
                guard.fail(_RAN_TWICE)
            spent = True
            return torch.zeros_like(gradient)

        self.token = torch.zeros((), requires_grad=True)
        self.token.register_hook(arrive)

    def trace(self, rows: Tensor | None) -> None:
        """Begin a forward pass in a graph that is being traced.

        Args:
            rows: how many it is over, a scalar; ``None`` if that is unknown.
        """
        self._ran = True
        if rows is None:
            self.token = _traced_token(rows, self._count)
        else:
            counter = self._rows if rows.device.type == "cpu" else self._rows_there
            self.token = _traced_token(rows, self._count, counter)

    def close(self) -> None:
        """End a forward pass: its graph holds the token now."""
        self.token = None

    def _arrive(self, count: Tensor | None) -> Tensor | None:
        if count is None:
            return None
        if not self._guard.idle:
            self._guard.require(self._guard.passes.begin_traced(int(count)))
            ran, self._ran = self._ran, False
            self._guard.require(None if ran else _RAN_TWICE)
        # What is accumulated does not count.
        return torch.zeros_like(count)

    def _arrive_rows(self, rows: Tensor | None) -> Tensor | None:
        if rows is None:
            return None
        if not self._guard.idle:
            self._guard.passes.note_rows(rows)
        return torch.zeros_like(rows)


class _Token(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor | None, *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return leaves[0].new_empty(())  # nobody reads it

    @staticmethod
    @first_order
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        one = torch.ones((), device="cpu")
        if rows is None:
            return None, one
        return None, one, rows.float()


@torch._dynamo.allow_in_graph
def _traced_token(rows: Tensor | None, *leaves: Tensor) -> Tensor:
    token: Tensor = _Token.apply(rows, *leaves)
    return token
