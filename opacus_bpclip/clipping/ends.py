"""How often traced graphs use a layer in one backward pass.

Inside a traced graph nothing can be counted. But each of the layer's scopes sends a 1 to a tensor,
and autograd adds up what a backward pass sends there. The layer's eager uses in the same forward
pass spend the same budget: the guard adds them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opacus_bpclip.guard.guard import GradientGuard
from opacus_bpclip.model.layer import Layer


class Ends:
    """Counts for one layer.

    Args:
        layer: the layer.
        guard: checks the model's gradients.

    Attributes:
        counter: the tensor to which the scopes send a 1.
    """

    def __init__(self, layer: Layer, guard: GradientGuard) -> None:
        self._layer, self._guard = layer, guard
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
        self._guard.require(self._guard.passes.note_traced_uses(self._layer, int(count)))
        # What is accumulated does not count.
        return torch.zeros_like(count)
