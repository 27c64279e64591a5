"""A loss may have terms over intermediates: their means are undone like those of the outputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import make_private, summed


class Leaky(nn.Module):
    """Keeps an intermediate aside, for a term in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        for layer in (self.first, self.last):
            nn.init.ones_(layer.weight)

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.hidden = self.first(x)
        return {"prediction": SimpleNamespace(logits=self.last(self.hidden))}


@pytest.mark.parametrize("of_output", [0.0, -1 / 4.5], ids=["alone", "beside the outputs"])
def test_a_mean_over_an_intermediate_is_undone_like_that_of_the_outputs(of_output: float) -> None:
    # Undone at the outputs only, this term would reach the layer divided by the private batch size:
    # one example more would turn the others' gradients around, and move the sum by 9 times C.
    def contributions(size: int) -> Tensor:
        private = make_private(Leaky())
        output = private.model(torch.ones(size, 1))["prediction"].logits
        inner = private.handle._module.hidden
        (1e6 * inner.mean() + 1e6 * of_output * output.mean()).backward()
        private.optimizer.step()
        return summed(private)

    for size in (1, 4):
        assert (contributions(size + 1) - contributions(size)).norm() <= 1.0 + 1e-6
    assert torch.allclose(contributions(4), 4 * contributions(1), rtol=1e-5)
