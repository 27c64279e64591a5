"""Train on two processes, each with its share of a batch; the test starts it with torchrun."""

import tempfile
from pathlib import Path

from tests.integrations.plain import flat
from tests.integrations.tiny import trainer

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(Path(folder))
        run.train()
        # Both have the same model, so one noise, and count the same steps.
        print(f"found {run.engine.accountant.history} {float(flat(run.model).sum())};", flush=True)
