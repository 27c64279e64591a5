"""Train a Lightning module privately: ``python docs/examples/lightning_digits.py``."""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip.integrations.lightning import PrivacyArguments, PrivateTrainer


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        x, y = batch
        return self.criterion(self(x), y)

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
data = TensorDataset(x.float() / 16, y)
train, test = torch.utils.data.random_split(data, [1500, 297])
trainer = PrivateTrainer(
    max_epochs=6,
    precision="bf16-mixed",
    privacy=PrivacyArguments(target_epsilon=3.0, target_delta=1e-4),
    max_grad_norm=1.0,
    max_physical_batch_size=128,
    criterion="criterion",
    logger=False,
    accelerator="cpu",
)
trainer.fit(Digits(), DataLoader(train, batch_size=300), DataLoader(test, batch_size=297))
accuracy = float(trainer.callback_metrics["accuracy"])
print(f"accuracy {accuracy:.2f}, epsilon {trainer.epsilon:.2f} at delta 1e-4")
