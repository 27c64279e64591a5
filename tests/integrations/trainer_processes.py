"""Train on two processes, each with its share of a batch; the test starts it with torchrun."""

import sys
from pathlib import Path

from tests.integrations.plain import flat
from tests.integrations.tiny import trainer

if __name__ == "__main__":
    folder = Path(sys.argv[1])  # one for both processes
    trainer(folder, save_strategy="epoch").train()
    run = trainer(folder, num_train_epochs=2)
    for _ in range(2):
        run.train(resume_from_checkpoint=folder / "checkpoint-4")
    # Both have the same model, so one noise, and count the same steps.
    print(f"found {run.engine.accountant.history} {float(flat(run.model).sum())};", flush=True)
