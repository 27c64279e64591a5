"""Every Hypothesis strategy of the suite: layers, architectures, options and hostile batches."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping

BOUNDS = ("product", "weighted", "exact")
MODES = tuple(itertools.product(BOUNDS, ("clip", "normalize")))

# PyTorch itself cannot run an instance norm on an empty batch.
NO_EMPTY_BATCH = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

seeds = st.integers(0, 2**31 - 1)
scales = st.integers(-30, 30).map(lambda exponent: 10.0**exponent)


@dataclass(frozen=True)
class LayerCase:
    """A layer and the shape of one example that fits it."""

    layer: nn.Module
    shape: tuple[int, ...]


@st.composite
def linear_cases(draw: st.DrawFn) -> LayerCase:
    torch.manual_seed(draw(seeds))
    features = draw(st.integers(1, 4))
    axes = tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
    layer = nn.Linear(features, draw(st.integers(1, 4)), bias=draw(st.booleans()))
    return LayerCase(layer, (*axes, features))


@st.composite
def conv_cases(draw: st.DrawFn, dims: st.SearchStrategy[int] | None = None) -> LayerCase:
    torch.manual_seed(draw(seeds))
    spatial = draw(dims or st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    size = 6 if spatial < 3 else 4
    shape = tuple(draw(st.integers(3, size)) for _ in range(spatial))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(spatial))
    dilation = tuple(
        draw(st.integers(1, 2)) if (k - 1) * 2 < s else 1
        for k, s in zip(kernel, shape, strict=True)
    )
    padding = draw(
        st.one_of(
            st.sampled_from(["same", "valid"]),
            st.tuples(*(st.integers(0, 2) for _ in range(spatial))),
        )
    )
    stride = (1,) * spatial
    if padding != "same":
        stride = tuple(draw(st.integers(1, 3)) for _ in range(spatial))
    layer_class = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    layer = layer_class(
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )
    return LayerCase(layer, (layer.in_channels, *shape))


product_cases = st.one_of(linear_cases(), conv_cases())


@st.composite
def norm_cases(draw: st.DrawFn) -> LayerCase:
    torch.manual_seed(draw(seeds))
    kind = draw(st.sampled_from(["layer", "rms", "group", "instance"]))
    channels = draw(st.integers(1, 4)) * 2
    axes = tuple(draw(st.lists(st.integers(2, 4), min_size=1, max_size=2)))
    if kind == "layer":
        return LayerCase(nn.LayerNorm(channels, bias=draw(st.booleans())), (*axes, channels))
    if kind == "rms":
        return LayerCase(nn.RMSNorm(channels), (*axes, channels))
    if kind == "group":
        return LayerCase(nn.GroupNorm(draw(st.integers(1, 2)), channels), (channels, *axes))
    layer_class = (nn.InstanceNorm1d, nn.InstanceNorm2d)[len(axes) - 1]
    return LayerCase(layer_class(channels, affine=True), (channels, *axes))


layer_cases = st.one_of(product_cases, norm_cases())


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
    torch.manual_seed(draw(seeds))
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


@st.composite
def clippings(draw: st.DrawFn) -> BackpropClipping:
    bound = draw(st.sampled_from(BOUNDS))
    norms = st.sampled_from([0.1, 1.0, 3.0, 100.0])
    return BackpropClipping(
        bound=bound,
        max_input_norm=draw(norms if bound == "product" else st.one_of(st.none(), norms)),
        allocation=draw(st.sampled_from(["equal", "dimension"])),
        upstream=draw(st.sampled_from(["clip", "normalize"])),
    )


@st.composite
def hostile_examples(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One example: noise, a single spike, constant, zero, inf or nan, at any scale."""
    generator = torch.Generator().manual_seed(draw(seeds))
    kind = draw(st.sampled_from(["normal", "normal", "spike", "constant", "zero", "inf", "nan"]))
    x = torch.zeros(shape, dtype=dtype)
    flat = x.view(-1)
    position = draw(st.integers(0, flat.numel() - 1)) if flat.numel() else 0
    if kind == "normal":
        x.normal_(generator=generator)
    elif kind == "constant":
        x.fill_(1.0)
    elif kind != "zero":
        flat[position] = {"spike": 1.0, "inf": float("inf"), "nan": float("nan")}[kind]
    return x * draw(scales)


@st.composite
def hostile_batches(
    draw: st.DrawFn,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    min_size: int = 0,
) -> Tensor:
    """``[B, *shape]`` with B from ``min_size`` to 5."""
    rows = [draw(hostile_examples(shape, dtype)) for _ in range(draw(st.integers(min_size, 5)))]
    return torch.stack(rows) if rows else torch.zeros(0, *shape, dtype=dtype)
