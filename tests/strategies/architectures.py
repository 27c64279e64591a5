"""Models of several layers."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.strategies.layers import LayerCase, layer_cases
from tests.strategies.numbers import seed_torch


class Branches(nn.Module):
    """Layers side by side on the same input, so that one example can saturate them all."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x).flatten(1) for branch in self.branches], dim=1)


@st.composite
def architectures(draw: st.DrawFn) -> LayerCase:
    """A model of one to four layers, deep or side by side, or frozen in part."""
    seed_torch(draw)
    first = draw(layer_cases)
    kind = draw(st.sampled_from(["single", "deep", "deeper", "branches", "frozen bias"]))
    layer = first.layer
    if kind == "branches":
        other = nn.Sequential(nn.Flatten(), nn.Linear(int(torch.Size(first.shape).numel()), 2))
        return LayerCase(Branches(layer, other), first.shape)
    if kind == "frozen bias" and getattr(layer, "bias", None) is not None:
        layer.bias.requires_grad_(False)
    if kind in ("deep", "deeper"):
        with torch.no_grad():
            features = layer(torch.zeros(1, *first.shape)).numel()
        activation = draw(st.sampled_from([nn.Tanh(), nn.ReLU(inplace=True), nn.Identity()]))
        hidden = [nn.Linear(features, 3), nn.Tanh()] if kind == "deeper" else []
        width = 3 if hidden else features
        head = nn.Linear(width, 2, bias=draw(st.booleans()))
        return LayerCase(nn.Sequential(layer, activation, nn.Flatten(), *hidden, head), first.shape)
    return LayerCase(layer, first.shape)
