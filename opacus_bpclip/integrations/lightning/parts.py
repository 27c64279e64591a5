"""Samples in parts: one batch of Lightning's loop is one logical batch, of any number of parts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import wraps
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from opacus_bpclip.optimizer.optimizer import BackpropClipOptimizer
from opacus_bpclip.sampling.loader import PrivateDataLoader


class Samples:
    """The private loader as Lightning's loop reads it: the first physical batch of each sample.

    It is no ``DataLoader``, so Lightning takes it as it is and does not replace its sampler.

    Args:
        loader: the private loader.
    """

    def __init__(self, loader: PrivateDataLoader) -> None:
        self.loader = loader
        self.further: Iterator[Any] = iter(())

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self.further = iter(self.loader)
        yield from self.further


def step_in_parts(
    module: LightningModule, optimizer: BackpropClipOptimizer, samples: Samples
) -> None:
    """Have ``training_step`` run all physical batches of a sample, the last one for Lightning.

    Args:
        module: its ``training_step`` is replaced, until ``del module.training_step``.
        optimizer: collects the sums of all physical batches but the last.
        samples: draws the physical batches after the first.
    """
    step = module.training_step
    strategy = module.trainer.strategy

    @wraps(step)
    def whole_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
        while optimizer._check_skip_next_step(pop_next=False):
            loss = step(batch, *args, **kwargs)
            optimizer.zero_grad()
            _backward(strategy, loss if isinstance(loss, Tensor) else loss["loss"])
            optimizer.step()  # It only collects: more physical batches follow.
            batch = module.on_before_batch_transfer(next(samples.further), 0)
            batch = strategy.batch_to_device(batch, dataloader_idx=0)
        return step(batch, *args, **kwargs)

    module.training_step = whole_step


def require_automatic(module: LightningModule) -> None:
    """Refuse to split the samples of a module that steps its optimizer itself.

    Raises:
        ValueError: it does.
    """
    if not module.automatic_optimization:
        raise ValueError(
            "max_physical_batch_size needs automatic optimization. In manual optimization, split "
            "the batch in training_step, and take a step for each part, before which "
            "self.optimizers().signal_skip_step(do_skip) says whether more parts follow."
        )


def _backward(strategy: Any, loss: Tensor) -> None:
    # Lightning's own backward pass is outside of autocast, too.
    with torch.autocast(loss.device.type, enabled=False):
        strategy.backward(loss, None)
