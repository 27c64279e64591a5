"""Texts of several lengths, ways to pad them, and models that see the padding or leave it out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from opacus.layers import DPGRU, DPLSTM
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from tests.helpers import CLASSES

WORDS, WIDTH = 20, 6


def texts(lengths: tuple[int, ...] = (5, 3, 9, 4)) -> list[tuple[Tensor, Tensor]]:
    drawn = torch.Generator().manual_seed(0)
    return [
        (
            torch.randint(1, WORDS, (lengths[i % len(lengths)],), generator=drawn),
            torch.tensor(i % CLASSES),
        )
        for i in range(16)
    ]


def padded(items: list[Any], **options: Any) -> Any:
    words, labels = zip(*items, strict=True)
    return pad_sequence(list(words), batch_first=True, **options), torch.stack(labels)


def sorted_by_length(items: list[Any]) -> Any:
    return padded(sorted(items, key=lambda item: -len(item[0])))


def to_a_public_length(items: list[Any]) -> Any:
    return padded([(F.pad(words, (0, 12 - len(words))), label) for words, label in items])


def on_the_left(items: list[Any]) -> Any:
    return padded(items, padding_side="left")


def masked_at_random(items: list[Any]) -> Any:
    words, labels = padded(items)
    return words * (torch.rand(words.shape) < 0.5), labels


def with_mask(items: list[Any]) -> Any:
    words, labels = padded(items)
    return words, (words > 0).long(), labels


def from_lists(items: list[Any]) -> Any:
    return padded([(torch.tensor(own["words"]), own["label"][0]) for own in items])


def with_lengths(items: list[Any]) -> Any:
    words, labels = padded(items)
    return words, torch.tensor([len(own) for own, _ in items]), labels


class Text(nn.Module):
    def __init__(self, body: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.body, self.head = body, nn.Linear(WIDTH, CLASSES)


class Mean(Text):
    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.words(words).mean(1))


class Dropped(Text):
    def forward(self, words: Tensor) -> Tensor:
        return self.head(F.dropout(self.words(words), 0.5).mean(1))


class Last(Text):
    def __init__(self) -> None:
        super().__init__(DPGRU(WIDTH, WIDTH, batch_first=True))

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.body(self.words(words))[0][:, -1])


class Maximum(Text):
    def __init__(self) -> None:
        super().__init__(nn.Conv1d(WIDTH, WIDTH, 3, padding=1))

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.body(self.words(words).transpose(1, 2)).amax(2))


class Tags(Text):
    """One output for each word, of the words on both sides."""

    def __init__(self) -> None:
        super().__init__(DPLSTM(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True))

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.body(self.words(words))[0])


class SequenceFirst(Text):
    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.words(words).mean(0))


class MaskedMean(Text):
    def forward(self, words: Tensor) -> Tensor:
        mask = (words > 0).unsqueeze(2).to(self.words.weight.dtype)
        mean = (self.words(words) * mask).sum(1) / mask.sum(1).clamp(min=1)
        return self.head(F.dropout(mean, 0.5, self.training))


class Packed(Text):
    def __init__(self) -> None:
        super().__init__(DPGRU(WIDTH, WIDTH, batch_first=True))

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        own = self.words(words)
        if not len(words):
            return self.head(own.new_zeros(0, WIDTH))
        packed = pack_padded_sequence(
            own, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False
        )
        return self.head(self.body(packed)[1][0])


class Causal(Text):
    """One output for each word, of the words before it."""

    def __init__(self) -> None:
        super().__init__(DPGRU(WIDTH, WIDTH, batch_first=True))

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.body(self.words(words))[0])


class OptionalMask(Text):
    """A mean with a mask that may be left out, as many models have it."""

    def forward(self, words: Tensor, mask: Tensor | None = None) -> Tensor:
        own = self.words(words)
        mask = torch.ones(words.shape, device=words.device) if mask is None else mask
        mask = mask.unsqueeze(2).to(own.dtype)
        return self.head((own * mask).sum(1) / mask.sum(1).clamp(min=1))


class Attending(Text):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH))

    def forward(self, words: Tensor) -> Tensor:
        own, kept = self.words(words), (words > 0)[:, None, :]
        scores = (self.body(own) @ own.transpose(1, 2)).masked_fill(~kept, -1e30)
        return self.head(scores.softmax(2) @ own)[:, 0]
