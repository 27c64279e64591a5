"""Train with Lightning on two processes, in parts; the test starts it with torchrun."""

import sys
from pathlib import Path
from typing import Any

from tests.integrations.plain import flat
from tests.integrations.tiny_lightning import Net, data, trainer


def both(folder: Path, **options: Any) -> Any:
    return trainer(folder, strategy="ddp", devices=2, max_physical_batch_size=2, **options)


if __name__ == "__main__":
    folder = Path(sys.argv[1])  # one for both processes
    run = both(folder, max_epochs=1)
    run.fit(Net(), data(32, batch_size=8))
    run.save_checkpoint(folder / "both.ckpt")
    run, net = both(folder), Net()
    for _ in range(2):
        run.fit(net, data(32, batch_size=8), ckpt_path=folder / "both.ckpt")
    print(f"found {run.engine.accountant.history} {float(flat(net).sum())};", flush=True)
