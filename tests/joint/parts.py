"""Tensors and checks of the tests around a backward pass."""

import torch
from torch import Tensor


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def target_for(rows: int, outputs: int) -> Tensor:
    return doubles(rows, outputs) * torch.logspace(-2, 2, rows, dtype=torch.float64)[:, None]
