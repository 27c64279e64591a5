"""Layers of every signature, behind one that the tests can feed: ``[B, *]`` floats in and out."""

from __future__ import annotations

import torch
from opacus.layers import DPRNN
from torch import Tensor, nn


def ids_of(x: Tensor, vocabulary: int) -> Tensor:
    """Read token ids off numbers of any size, each example's off its own."""
    return x.detach().nan_to_num().abs().clamp(max=1e6).long() % vocabulary


class Tokens(nn.Module):
    """An embedding of token ids that are read off the input."""

    def __init__(self, layer: nn.Embedding) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(ids_of(x, self.layer.num_embeddings))


class Bags(nn.Module):
    """An `nn.EmbeddingBag` in each of its signatures; ``[B, 2, N]``: ids, then weights.

    Args:
        layer: the embedding bag.
        offsets: pass all bags in one row; the first id tells how many tokens a bag has, also none.
        weighted: pass the weights.
        score: makes the weights of a bag from the given ones.
    """

    def __init__(
        self,
        layer: nn.EmbeddingBag,
        *,
        offsets: bool = False,
        weighted: bool = False,
        score: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.score = score
        self.offsets = offsets
        self.weighted = weighted

    def forward(self, x: Tensor) -> Tensor:
        ids = ids_of(x[:, 0], self.layer.num_embeddings)
        weights = None
        if self.weighted:
            weights = x[:, 1] if self.score is None else self.score(x[:, 1])
        if not self.offsets:
            return self.layer(ids, None, weights)
        lengths = ids_of(x[:, 0, 0], ids.shape[1] + 1)
        kept = torch.arange(ids.shape[1]) < lengths[:, None]
        offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))
        if not self.layer.include_last_offset:
            offsets = offsets[:-1]
        weights = None if weights is None else weights[kept]
        return self.layer(ids[kept], offsets, per_sample_weights=weights)


class Pair(nn.Module):
    """A bilinear layer of the two parts of its input's last axis."""

    def __init__(self, layer: nn.Bilinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(*x.split([self.layer.in1_features, self.layer.in2_features], dim=-1))


class BatchSecond(nn.Module):
    """A layer that has the batch on its second axis, in a model that has it on its first."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


class Steps(nn.Module):
    """The input layer of a recurrent network, which runs once a time step; the rest is frozen."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.network = DPRNN(features, hidden, batch_first=True, nonlinearity="relu")
        self.network.cells[0].hh.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[0][:, -1]
