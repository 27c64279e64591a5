"""Killers of mutants of the trainers: what a run has counted, and what one step has moved."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.integrations.plain import flat
from tests.integrations.tiny import Texts, bert, trainer

CLIP = 1e-2
# With it, the first two samples of four items at rate 1/2 hold three items and four.
SEED = 35


def _train(folder: Path, resume: Path | None = None, **options: Any) -> Any:
    run = trainer(folder, data=Texts(8), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        run.train(resume_from_checkpoint=resume and str(resume))
    return run


def _check_counted(run: Any, steps: int) -> None:
    counted = sum(count for _, _, count in run.engine.accountant.history)
    assert counted == steps, f"the accountant has {counted} of {steps} steps"


def whole_run() -> None:
    """Two steps of Hugging Face's trainer."""
    with tempfile.TemporaryDirectory() as folder:
        _check_counted(_train(Path(folder)), 2)


def resumed_run() -> None:
    """Two steps, a checkpoint, and two more after it."""
    with tempfile.TemporaryDirectory() as folder:
        _train(Path(folder), save_strategy="epoch")
        again = _train(Path(folder), Path(folder) / "checkpoint-2", num_train_epochs=2)
        _check_counted(again, 4)


class _Equal(Texts):
    """The first sequence, again and again."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return super().__getitem__(0)


def one_step_of_equal_examples() -> None:
    """Samples of four examples that all push the model in one direction, each to the limit."""
    model = bert()
    before = flat(model)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = trainer(
            Path(folder),
            model=model,
            data=_Equal(4),
            privacy={
                "noise_multiplier": 0.0,
                "sampling_generator": torch.Generator().manual_seed(SEED),
            },
            optimizers=(torch.optim.SGD(model.parameters(), lr=1.0), None),
            per_device_train_batch_size=2,
            max_grad_norm=CLIP,
            max_steps=1,
        )
        run.train()
    # The divisor is the expected batch size, 2.
    moved = 2 * float((flat(model) - before).norm()) / CLIP
    assert moved < 4.01, f"one step on four examples moved by {moved:.2f} times the claim"
