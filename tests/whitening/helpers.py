"""A model with layers of every kind that is whitened, and what the tests ask of its trainer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping, InputWhitening, PinkNoise
from opacus_bpclip.rules.whitened import PublicMatrix
from tests.checks import Trainer

ALLOCATIONS = pytest.mark.parametrize("allocation", ["joint", "equal"])


def network() -> nn.Sequential:
    """Layers of every kind that is whitened, and layers that are left as they are."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Conv2d(4, 3, 2, stride=2, bias=False),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
        nn.Flatten(2),
        nn.Linear(4, 5),
        nn.LayerNorm(5),
        nn.Flatten(),
        nn.Linear(15, 3),
    ).double()


SHAPE = (2, 7, 7)


def dense(matrix: PublicMatrix) -> Tensor:
    """Return ``M``, ``[R, D, D]``."""
    groups, size, _ = matrix.directions.shape
    return matrix.times(torch.eye(size, dtype=matrix.scale.dtype).repeat(groups, 1, 1))


def clipping_of(
    allocation: str = "joint", *, power: float = 0.5, every: int = 1, rank: int = 32
) -> BackpropClipping:
    whitening = InputWhitening(PinkNoise(SHAPE, count=9), power=power, every=every, rank=rank)
    return BackpropClipping(allocation=allocation, whitening=whitening)  # type: ignore[arg-type]


def batch(size: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    make = {"dtype": torch.float64, "generator": generator}
    return torch.randn(size, *SHAPE, **make), torch.randn(size, 3, **make)  # type: ignore[call-overload]


def matrices_of(trainer: Trainer) -> dict[str, Tensor]:
    layers = trainer.optimizer._hooks._whitening.layers
    return {name: dense(own.matrix) for name, own in layers.items()}
