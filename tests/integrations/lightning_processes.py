"""Train with Lightning on two processes, in parts; the test starts it with torchrun."""

import tempfile
from pathlib import Path

from tests.integrations.plain import flat
from tests.integrations.tiny_lightning import Net, data, trainer

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        net = Net()
        run = trainer(
            Path(folder), max_epochs=1, strategy="ddp", devices=2, max_physical_batch_size=2
        )
        run.fit(net, data(32, batch_size=8))
        print(f"found {run.engine.accountant.history} {float(flat(net).sum())};", flush=True)
        run.save_checkpoint(Path(folder) / "both.ckpt")
