"""The models that are compared, and a batch for each.

Every model can be trained by every arm as far as the arm allows: no normalisation over
the batch, no activation in place, nothing but layers that Opacus knows.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from opacus.layers import DPLSTM
from torch import Tensor, nn
from torch.nn import functional as F

from opacus_bpclip.ab.models import cnn26k
from opacus_bpclip.bench.settings import Case

CLASSES = 10
_PIXELS = 28 * 28
_FEATURES = 64


def build(case: Case) -> nn.Module:
    """Return a freshly initialised model; weights come from torch's global generator."""
    return _MODELS[case.family](**case.sizes)


def batch(case: Case) -> tuple[Tensor, Tensor]:
    """Return random inputs of the model, and labels. ``[B, ...]`` and ``[B]``."""
    size = case.batch_size
    if case.vocabulary is not None:
        assert case.length is not None
        inputs = torch.randint(case.vocabulary, (size, case.length))
    else:
        inputs = torch.randn(size, *_input_shape(case))
    return inputs, torch.randint(CLASSES, (size,))


def _input_shape(case: Case) -> tuple[int, ...]:
    if case.family == "lstm":
        assert case.length is not None
        return case.length, _FEATURES
    return {"cnn26k": (1, 28, 28), "resnet18-gn": (3, 32, 32), "mlp": (_PIXELS,)}[case.family]


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a way around them, on ``[B, C_in, H, W]``."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False),
            _group_norm(channels),
        )
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), _group_norm(channels)
        )
        self.around: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.around = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), _group_norm(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        return F.relu(self.second(F.relu(self.first(x))) + self.around(x))


def resnet18_gn(width: int) -> nn.Module:
    """Return ResNet-18 for small images, GroupNorm in place of BatchNorm. ``[B, 3, 32, 32]``."""
    blocks: list[nn.Module] = []
    channels_in = width
    for stage in range(4):
        channels = width * 2**stage
        blocks += [
            ResidualBlock(channels_in, channels, stride=1 if stage == 0 else 2),
            ResidualBlock(channels, channels, stride=1),
        ]
        channels_in = channels
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        _group_norm(width),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels_in, CLASSES),
    )


class Attention(nn.Module):
    """Self-attention of four heads. ``[B, T, D]`` to the same."""

    heads = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query: nn.Module
        self.key: nn.Module
        self.value: nn.Module
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to every position."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """A pre-norm layer of a transformer. ``[B, T, D]`` to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add attention, then the MLP."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Tokens and learned positions, layers, mean over positions, head. ``[B, T]`` ids."""

    def __init__(self, width: int, depth: int, length: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.layers = nn.Sequential(*(EncoderLayer(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits, ``[B, CLASSES]``."""
        # A row of positions for every example, so that each has its own gradient of them; a copy,
        # since Opacus's ghost mode asks for contiguous ids.
        positions = torch.arange(ids.shape[1], device=ids.device).repeat(ids.shape[0], 1)
        x = self.layers(self.tokens(ids) + self.positions(positions))
        return self.head(self.norm(x).mean(dim=1))


class LowRank(nn.Module):
    """A frozen linear layer with a trainable product of two small ones beside it."""

    rank = 8

    def __init__(self, frozen: nn.Module, width: int) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(width, self.rank, bias=False)
        self.up = nn.Linear(self.rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both."""
        return self.frozen(x) + self.up(self.down(x))


def lora(width: int, depth: int, length: int, vocabulary: int) -> nn.Module:
    """Return a frozen encoder with adapters on queries and values, and a head that trains."""
    model = Encoder(width, depth, length, vocabulary).requires_grad_(False)
    model.head.requires_grad_(True)
    for module in list(model.modules()):
        if isinstance(module, Attention):
            module.query, module.value = (
                LowRank(layer, width) for layer in (module.query, module.value)
            )
    return model


class Text(nn.Module):
    """A large embedding under a small network: mean of the words' vectors. ``[B, T]`` ids."""

    def __init__(self, width: int, length: int, vocabulary: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, CLASSES))

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits, ``[B, CLASSES]``."""
        return self.head(self.words(ids).mean(dim=1))


class Recurrent(nn.Module):
    """Opacus's LSTM, whose linear layers every arm can train. ``[B, T, 64]``."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.lstm = DPLSTM(_FEATURES, width, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits after the last step, ``[B, CLASSES]``."""
        return self.head(self.lstm(x)[0][:, -1])


def mlp(width: int, depth: int) -> nn.Module:
    """Return a network of linear layers on 784 features."""
    sizes = [_PIXELS, *[width] * depth]
    layers: list[nn.Module] = []
    for size_in, size in pairwise(sizes):
        layers += [nn.Linear(size_in, size), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], CLASSES))


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(min(32, channels), channels)


_MODELS: dict[str, Callable[..., nn.Module]] = {
    "cnn26k": cnn26k,
    "resnet18-gn": resnet18_gn,
    "transformer": Encoder,
    "lora": lora,
    "text": Text,
    "lstm": Recurrent,
    "mlp": mlp,
}
