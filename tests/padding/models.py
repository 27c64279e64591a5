"""Models of several kinds, and items for them, as a loader with a constant shape pads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from opacus.layers import DPLSTM
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

CLASSES, WORDS, LENGTH, WIDTH = 3, 9, 5, 6


class Kind(NamedTuple):
    """A model and its data.

    Attributes:
        build: returns the model, which is called with all but the last part of a batch.
        item: returns the item of an index.
    """

    build: Callable[[], nn.Module]
    item: Callable[[torch.Generator], tuple[Any, ...]]


def vector(drawn: torch.Generator) -> tuple[Any, ...]:
    return (3 * torch.randn(4, generator=drawn),)


def picture(drawn: torch.Generator) -> tuple[Any, ...]:
    return (torch.randn(1, 6, 6, generator=drawn),)


def sentence(drawn: torch.Generator) -> tuple[Any, ...]:
    """Tokens from 1 on, and a mask of those that count."""
    ids = torch.randint(1, WORDS, (LENGTH,), generator=drawn)
    length = int(torch.randint(1, LENGTH + 1, (), generator=drawn))
    return ids, torch.arange(LENGTH) < length


def sequence(drawn: torch.Generator) -> tuple[Any, ...]:
    """Vectors, and how many of them count."""
    length = int(torch.randint(1, LENGTH + 1, (), generator=drawn))
    return torch.randn(LENGTH, WIDTH, generator=drawn), length


class Attention(nn.Module):
    """Words that attend to those that count: a row without any is not a number."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids)
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        seen = scores.masked_fill(~mask[:, None, :], float("-inf")).softmax(dim=-1)
        return self.head(self.norm(x + seen @ x).mean(dim=1))


class Reading(nn.Module):
    """A recurrent network over packed sequences; one of padding has the length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = DPLSTM(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            x, lengths.clamp(min=1), batch_first=True, enforce_sorted=False
        )
        return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0].sum(dim=1))


class ByFunctions(nn.Module):
    """Parameters that functions are called on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))
        self.weight = nn.Parameter(torch.randn(CLASSES, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(x * self.scale), self.weight)


class UsedTwice(nn.Module):
    """A layer that is called twice, and one tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.other(torch.tanh(self.one(x)))))


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, CLASSES))


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(32, CLASSES)
    )


def sequences() -> nn.Sequential:
    """Few positions and channels: examples' own gradients are made, a few at a time."""
    return nn.Sequential(
        nn.Unflatten(1, (4, 1)), nn.Linear(1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, CLASSES)
    )


KINDS = {
    "perceptron": Kind(perceptron, vector),
    "convolutions": Kind(convolutions, picture),
    "sequences": Kind(sequences, vector),
    "attention": Kind(Attention, sentence),
    "recurrent": Kind(Reading, sequence),
    "functions": Kind(ByFunctions, vector),
    "used twice": Kind(UsedTwice, vector),
}


def items_of(kind: str, count: int = 24) -> list[tuple[Any, ...]]:
    """Return items, each with its class at the end."""
    drawn = torch.Generator().manual_seed(3)
    return [(*KINDS[kind].item(drawn), index % CLASSES) for index in range(count)]
