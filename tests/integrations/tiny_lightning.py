"""A tiny module and data for Lightning's trainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip.integrations.lightning import PrivacyArguments, PrivateTrainer
from tests.integrations.plain import CLASSES, PRIVACY

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Net(L.LightningModule):
    """A model of two layers, in automatic or manual optimization.

    Args:
        manual: whether `training_step` steps the optimizer itself.
        lr: the learning rate.

    Attributes:
        seen: the number of examples of each call of `training_step`.
    """

    def __init__(self, *, manual: bool = False, lr: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, CLASSES))
        self.criterion = nn.CrossEntropyLoss()
        self.automatic_optimization = not manual
        self.lr, self.seen = lr, []

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        x, y = batch
        self.seen.append(len(x))
        loss = self.criterion(self(x), y)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def data(count: int, *, batch_size: int) -> DataLoader[Any]:
    """Return a loader of the first ``count`` of some examples."""
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))[:count]
    return DataLoader(TensorDataset(x, torch.arange(count) % CLASSES), batch_size=batch_size)


def trainer(
    folder: Path, *, privacy: dict[str, Any] | None = None, **options: Any
) -> PrivateTrainer:
    """Return a private trainer; ``options`` are those of Lightning's, or its own."""
    quiet = {
        "accelerator": "cpu",
        "default_root_dir": folder,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
        "max_epochs": 2,
    }
    return PrivateTrainer(
        privacy=PrivacyArguments(**{**PRIVACY, **(privacy or {})}), **{**quiet, **options}
    )
