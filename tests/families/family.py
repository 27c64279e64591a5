"""Models that people train, as they load them, at a tiny size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS, LENGTH, CLASSES = 48, 10, 3

# What most of Hugging Face's encoders call their sizes.
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
WORDS = {"vocab_size": TOKENS, "pad_token_id": 0}
# And what those of an encoder and a decoder do.
PAIR_SIZES = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "dropout": 0.0,
}

Data = Callable[[int], dict[str, Tensor]]
Losses = Callable[[nn.Module, dict[str, Tensor]], Tensor]


class Family(NamedTuple):
    """One model.

    Attributes:
        name: of the model and its head.
        build: returns the model.
        data: returns a batch of so many examples, tensors by name.
        losses: returns each example's loss.
    """

    name: str
    build: Callable[[], nn.Module]
    data: Data
    losses: Losses


FAMILIES: dict[str, Family] = {}


def add(name: str, build: Callable[[], Any], data: Data, losses: Losses) -> None:
    """Add a family to those that are tried."""
    FAMILIES[name] = Family(name, build, data, losses)


def floats(count: int, *shape: int) -> Tensor:
    """Return drawn numbers, the same for the same count."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))


def integers(low: int, high: int, count: int, *shape: int) -> Tensor:
    """Return drawn integers, the same for the same count."""
    drawn = torch.Generator().manual_seed(count)
    return torch.randint(low, high, (count, *shape), generator=drawn)


def tokens(count: int) -> dict[str, Tensor]:
    """Return sequences of tokens."""
    ids = integers(3, TOKENS, count, LENGTH)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pictures(count: int) -> dict[str, Tensor]:
    """Return pictures."""
    return {"pixel_values": floats(count, 3, 32, 32)}


def of_class(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the losses of a classification, by what the examples begin with."""
    first = next(iter(batch.values())).flatten(1)[:, 0]
    labels = (first > 0).long() if first.is_floating_point() else first % CLASSES
    return F.cross_entropy(model(**batch).logits, labels, reduction="none")


def of_tokens(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the losses of a classification of tokens, or of a masked language model."""
    logits = model(**batch).logits
    return _of_sequence(logits, batch["input_ids"] % logits.shape[-1])


def of_next(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the losses of a causal language model; tokens that a prompt adds do not count."""
    logits = model(**batch).logits[:, -LENGTH:-1]
    return _of_sequence(logits, batch["input_ids"][:, 1:])


def of_pairs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the losses of a sequence to sequence model."""
    logits = model(**batch, use_cache=False).logits[:, :-1]
    return _of_sequence(logits, batch["decoder_input_ids"][:, 1:])


def _of_sequence(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)
