"""A layer with clipping attached, and the same layer without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opacus_bpclip.config import BackpropClipping
from opacus_bpclip.hooks import BackpropClipHooks
from opacus_bpclip.testing.case import LIMIT, Case

Inputs = tuple[Tensor | None, ...]  # None for an argument that is left out
MakeInputs = Callable[[int], "Tensor | Inputs"]


class Run(NamedTuple):
    """The results of a forward and a backward pass: the clipped sum, and what other layers see."""

    contribution: Tensor
    visible: Inputs  # the output, and the gradients of the inputs


class ClippedLayer:
    """A layer with clipping attached, and the same layer without for comparison."""

    def __init__(self, case: Case, limit: float = LIMIT) -> None:
        self.layer = case.make_layer().to(case.dtype)
        self.plain = case.make_layer().to(case.dtype)
        config = BackpropClipping(
            bound=case.bound,  # type: ignore[arg-type]
            allocation=case.allocation,  # type: ignore[arg-type]
            normalize=case.normalize,
            max_input_norm=case.max_input_norm,
            probe=False,  # the checks of this package look for coupled examples themselves
        )
        self.axis = case.rule.from_module(self.layer).batch_axis(0)
        self.hooks = BackpropClipHooks(
            self.layer,
            config=config,
            max_grad_norm=limit,
            loss_reduction="sum",
            batch_first=self.axis == 0,
        )

    def make(self, inputs: MakeInputs, count: int) -> Inputs:
        """Return the arguments for ``count`` examples, in the layer's dtype."""
        made = inputs(count)
        dtype = next(self.layer.parameters()).dtype
        arguments = made if isinstance(made, tuple) else (made,)
        return each(arguments, lambda x: x.to(dtype) if x.is_floating_point() else x)

    def rows(self, arguments: Inputs, rows: Sequence[int]) -> Inputs:
        """Return the arguments for some of the examples."""
        index = torch.tensor(rows, dtype=torch.long)
        return each(arguments, lambda x: x.index_select(self.axis, index))

    def contribution(self, arguments: Inputs, upstream: Tensor) -> Tensor:
        """Return the clipped sum over the examples, all parameters flattened."""
        return self.run(arguments, upstream).contribution

    def run(self, arguments: Inputs, upstream: Tensor) -> Run:
        """Run the layer forward and backward."""
        arguments = each(arguments, lambda x: x.detach().requires_grad_(x.is_floating_point()))
        y = self.layer(*arguments)
        (y * upstream).sum().backward()
        guard = self.hooks._guard
        sums = [
            torch.zeros_like(p) if (taken := guard.take(p)) is None else taken
            for p in self.layer.parameters()
            if p.requires_grad
        ]
        guard.finish()
        visible = (y.detach(), *(None if x is None else x.grad for x in arguments))
        return Run(torch.cat([total.flatten() for total in sums]), visible)

    def gradient(self, arguments: Inputs, upstream: Tensor) -> Tensor:
        """Return the sum of the gradients by plain autograd, without clipping."""
        parameters = [p for p in self.plain.parameters() if p.requires_grad]
        loss = (self.plain(*arguments) * upstream).sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    def upstream(self, arguments: Inputs) -> Tensor:
        """Return a standard normal upstream gradient for these arguments."""
        with torch.no_grad():
            return torch.randn_like(self.plain(*arguments))

    def example(self, upstream: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the upstream gradient of some of the examples."""
        return upstream.index_select(self.axis, torch.tensor(rows, dtype=torch.long))


def each(arguments: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """Apply the function to each argument that is not left out."""
    return tuple(x if x is None else function(x) for x in arguments)
