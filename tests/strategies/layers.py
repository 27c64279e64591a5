"""Layers of every supported class, each with the shape of an example that fits it."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st
from opacus.layers.dp_multihead_attention import SequenceBias
from opacus.layers.dp_rnn import RNNLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.layers import Bags, BatchSecond, Pair, Steps, Tokens
from tests.strategies.numbers import seed_torch

# PyTorch itself cannot run an instance norm on an empty batch.
NO_EMPTY_BATCH = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@dataclass(frozen=True)
class LayerCase:
    """A layer and the shape of one example that fits it."""

    layer: nn.Module
    shape: tuple[int, ...]


@st.composite
def linear_cases(draw: st.DrawFn) -> LayerCase:
    seed_torch(draw)
    features = draw(st.integers(1, 4))
    axes = tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
    layer = nn.Linear(features, draw(st.integers(1, 4)), bias=draw(st.booleans()))
    return LayerCase(layer, (*axes, features))


@st.composite
def conv_cases(draw: st.DrawFn, dims: st.SearchStrategy[int] | None = None) -> LayerCase:
    seed_torch(draw)
    spatial = draw(st.integers(1, 3) if dims is None else dims)
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


NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


@st.composite
def norm_cases(draw: st.DrawFn, kinds: tuple[type[nn.Module], ...] = NORMS) -> LayerCase:
    seed_torch(draw)
    kind = draw(st.sampled_from(kinds))
    channels = draw(st.integers(1, 4)) * 2
    axes = tuple(draw(st.lists(st.integers(2, 4), min_size=1, max_size=2)))
    if kind is nn.LayerNorm:
        return LayerCase(nn.LayerNorm(channels, bias=draw(st.booleans())), (*axes, channels))
    if kind is nn.RMSNorm:
        return LayerCase(nn.RMSNorm(channels), (*axes, channels))
    if kind is nn.GroupNorm:
        return LayerCase(nn.GroupNorm(draw(st.integers(1, 2)), channels), (channels, *axes))
    axes = tuple(draw(st.integers(2, 3)) for _ in range(NO_EMPTY_BATCH.index(kind) + 1))
    return LayerCase(kind(channels, affine=True), (channels, *axes))


layer_cases = st.one_of(product_cases, norm_cases())


@st.composite
def conv_transpose_cases(draw: st.DrawFn, spatial: int) -> LayerCase:
    seed_torch(draw)

    def each(values: st.SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(draw(values) for _ in range(spatial))

    shape = each(st.integers(1, 4 if spatial < 3 else 2))
    kernel, stride, dilation = (each(st.integers(1, 3)) for _ in range(3))
    # No more padding than leaves one output position.
    spans = [
        (n - 1) * s + d * (k - 1)
        for n, s, d, k in zip(shape, stride, dilation, kernel, strict=True)
    ]
    groups = draw(st.integers(1, 3))
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[spatial - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=stride,
        padding=tuple(draw(st.integers(0, min(2, span // 2))) for span in spans),
        output_padding=tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        ),
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
    )
    return LayerCase(layer, (layer.in_channels, *shape))


@st.composite
def token_cases(draw: st.DrawFn) -> LayerCase:
    seed_torch(draw)
    vocabulary = draw(st.integers(1, 5))
    padding = draw(st.one_of(st.none(), st.integers(0, vocabulary - 1)))
    layer = nn.Embedding(vocabulary, draw(st.integers(1, 4)), padding_idx=padding)
    return LayerCase(Tokens(layer), tuple(draw(st.lists(st.integers(1, 5), max_size=2))))


@st.composite
def bag_cases(draw: st.DrawFn) -> LayerCase:
    seed_torch(draw)
    vocabulary, tokens = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    mode = draw(st.sampled_from(["sum", "mean", "max"]))
    layer = nn.EmbeddingBag(
        vocabulary,
        draw(st.integers(1, 4)),
        mode=mode,
        padding_idx=draw(st.one_of(st.none(), st.integers(0, vocabulary - 1))),
        include_last_offset=draw(st.booleans()),
    )
    weighted = mode == "sum" and draw(st.booleans())
    # Without offsets PyTorch raises an error for include_last_offset.
    offsets = layer.include_last_offset or draw(st.booleans())
    return LayerCase(Bags(layer, offsets=offsets, weighted=weighted), (2, tokens))


@st.composite
def bilinear_cases(draw: st.DrawFn) -> LayerCase:
    seed_torch(draw)
    one, other = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layer = nn.Bilinear(one, other, draw(st.integers(1, 3)), bias=draw(st.booleans()))
    axes = tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
    return LayerCase(Pair(layer), (*axes, one + other))


@st.composite
def prelu_cases(draw: st.DrawFn) -> LayerCase:
    axes = tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
    slopes = draw(st.integers(1, 3))
    shape = (slopes, *axes) if slopes > 1 else (*axes, 2)
    return LayerCase(nn.PReLU(slopes, init=draw(st.sampled_from([0.25, -1.0, 0.0]))), shape)


@st.composite
def sequence_bias_cases(draw: st.DrawFn) -> LayerCase:
    seed_torch(draw)
    features, batch_first = draw(st.integers(1, 4)), draw(st.booleans())
    layer = SequenceBias(features, batch_first=batch_first)
    shape = (draw(st.integers(1, 4)), features)
    return LayerCase(layer if batch_first else BatchSecond(layer), shape)


@st.composite
def transposed_linear_cases(draw: st.DrawFn) -> LayerCase:
    seed_torch(draw)
    features = draw(st.integers(1, 4))
    axes = tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
    return LayerCase(Conv1D(draw(st.integers(1, 4)), features), (*axes, features))


@st.composite
def step_cases(draw: st.DrawFn) -> LayerCase:
    seed_torch(draw)
    features = draw(st.integers(1, 3))
    return LayerCase(Steps(features, draw(st.integers(1, 3))), (draw(st.integers(1, 4)), features))


# By class: a model whose one trainable layer is of it.
CASES: dict[type[nn.Module], st.SearchStrategy[LayerCase]] = {
    nn.Linear: linear_cases(),
    nn.Conv1d: conv_cases(st.just(1)),
    nn.Conv2d: conv_cases(st.just(2)),
    nn.Conv3d: conv_cases(st.just(3)),
    nn.ConvTranspose1d: conv_transpose_cases(1),
    nn.ConvTranspose2d: conv_transpose_cases(2),
    nn.ConvTranspose3d: conv_transpose_cases(3),
    nn.Bilinear: bilinear_cases(),
    nn.PReLU: prelu_cases(),
    nn.Embedding: token_cases(),
    nn.EmbeddingBag: bag_cases(),
    **{kind: norm_cases((kind,)) for kind in NORMS},
    SequenceBias: sequence_bias_cases(),
    RNNLinear: step_cases(),
    Conv1D: transposed_linear_cases(),
}


@st.composite
def single_layers(draw: st.DrawFn, kind: type[nn.Module]) -> LayerCase:
    """A case of this class; where it has two parameters, one of them may be frozen."""
    case = draw(CASES[kind])
    own = [p for p in case.layer.parameters() if p.requires_grad]
    if len(own) > 1 and draw(st.integers(0, 3)) == 0:
        draw(st.sampled_from(own)).requires_grad_(False)
    return case
