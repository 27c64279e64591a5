"""Train with Lightning on two processes, in parts; the test starts it with torchrun."""

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from tests.integrations.plain import flat
from tests.integrations.tiny_lightning import Net, data, trainer


class Around(Net):
    """Has a frozen part and a buffer beside its model, other ones on each process at first.

    It has no ``forward``, so that the private model is ``model`` alone.
    """

    forward = L.LightningModule.forward

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(int(os.environ["LOCAL_RANK"]))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("scale", torch.randn(4))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return self.criterion(self.model(self.frozen(batch[0]) * self.scale), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=self.lr)


def both(folder: Path, **options: Any) -> Any:
    return trainer(folder, strategy="ddp", devices=2, max_physical_batch_size=2, **options)


if __name__ == "__main__":
    folder = Path(sys.argv[1])  # one for both processes
    run = both(folder, max_epochs=1)
    run.fit(Around(), data(32, batch_size=8))
    run.save_checkpoint(folder / "both.ckpt")
    run, net = both(folder), Around()
    for _ in range(2):
        run.fit(net, data(32, batch_size=8), ckpt_path=folder / "both.ckpt")
    state = float(flat(net).sum()), net.scale.tolist()
    print(f"found {run.engine.accountant.history} {state};", flush=True)
