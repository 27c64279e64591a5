"""The first look at a model: it spares most models the trials that functions on parameters need."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from opacus_bpclip import BackpropClipping
from opacus_bpclip.probe.shapes import sizes_of
from tests.helpers import CLASSES, FEATURES, make_private

RUNS: list[int] = []  # outside the model, where the trials put everything back


class Scaled(nn.Module):
    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.layer, self.scaled = nn.Linear(FEATURES, CLASSES), scaled
        self.scale = nn.Parameter(torch.ones(CLASSES), requires_grad=scaled)

    def forward(self, x: Tensor) -> Tensor:
        RUNS.append(len(x))
        y: Tensor = self.layer(x)
        return y * self.scale


def _runs(model: nn.Module) -> int:
    RUNS.clear()
    make_private(model, backprop=BackpropClipping(probe=False))
    return len(RUNS)


def test_layers_with_a_rule_are_looked_at_in_two_runs() -> None:
    assert _runs(Scaled(scaled=False)) == 2


def test_a_parameter_outside_them_is_seen_at_the_first() -> None:
    assert _runs(Scaled(scaled=True)) > 2


def test_sizes_are_in_the_order_of_pytrees_leaves() -> None:
    x, y = torch.zeros(2, 3), nn.Parameter(torch.zeros(4))
    value = (
        (x, [1, None, {"b": y, "a": 2.0}]),
        {"z": torch.Size((5,)), "c": slice(1, 2), "d": True},
    )
    leaves = pytree.tree_leaves(value)
    expected = [x.shape if isinstance(x, Tensor) else x if type(x) is int else None for x in leaves]
    assert list(sizes_of(value)) == expected
