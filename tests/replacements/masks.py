"""Masks that models make of their inputs, ``[B, T, D]``."""

import torch
from torch import Tensor, nn


def causal(x: Tensor) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)


def padding(x: Tensor) -> Tensor:
    """The last step of an example is padding if its first number is negative."""
    hidden = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    hidden[:, -1] = x[:, 0, 0] < 0
    return torch.zeros(hidden.shape, dtype=x.dtype).masked_fill(hidden, -torch.inf)
