"""A small model and data with views, made private."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import AugmentedViews, PrivacyEngine

VIEWS, CLASSES = 3, 4


def pictures(size: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(size, 1, 6, 6, generator=generator)
    return TensorDataset(x, torch.randint(CLASSES, (size,), generator=generator))


def noisy(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


def data() -> AugmentedViews:
    return AugmentedViews(pictures(), noisy, VIEWS, seed=7)


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES)
    )


def private(model: nn.Module, data: Any, **options: Any) -> tuple[Any, ...]:
    """Make a model private with the noise off."""
    engine = options.pop("engine", None) or PrivacyEngine()
    made: tuple[Any, ...] = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(data, batch_size=6, generator=torch.Generator().manual_seed(3)),
        noise_multiplier=0.0,
        max_grad_norm=0.1,
        **{"clipping": "backprop"} | options,
    )
    return made
