"""Samples in parts: one batch of Lightning's loop is one logical batch, of any number of parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from opacus_bpclip.errors import PrivacyViolationError
from opacus_bpclip.integrations.lightning.steps import TrainingStep
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
        self._batches: Iterator[Any] = iter(())
        self._is_new = False

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self._batches = iter(self.loader)
        for batch in self._batches:
            self._is_new = True
            yield batch

    def begin(self) -> None:
        """Begin with the parts of a sample.

        Raises:
            PrivacyViolationError: they have run before.
        """
        if not self._is_new:
            raise PrivacyViolationError(
                "training_step was called a second time for one sample. Its parts after the first "
                "were drawn in the first call, so the examples of the first part would count "
                "twice. With max_physical_batch_size, call the closure once in optimizer_step; to "
                "call it more often, leave max_physical_batch_size out."
            )
        self._is_new = False

    def next_part(self) -> Any:
        """Return the next physical batch of the sample."""
        return next(self._batches)


def in_parts(
    step: TrainingStep,
    *,
    module: LightningModule,
    optimizer: BackpropClipOptimizer,
    samples: Samples,
) -> TrainingStep:
    """Return a ``training_step`` for a whole sample, whose last part is left to Lightning.

    A part whose ``training_step`` returns ``None`` contributes nothing.

    Args:
        step: the module's own.
        module: the module, attached to a trainer.
        optimizer: collects the sums of all physical batches but the last.
        samples: draws the physical batches after the first.
    """

    def whole_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
        samples.begin()
        while optimizer._check_skip_next_step(pop_next=False):
            output = step(batch, *args, **kwargs)
            optimizer.zero_grad()
            _backward(module.trainer, output)
            optimizer.step()  # It only collects: more physical batches follow.
            batch = _transferred(module, samples.next_part())
        return step(batch, *args, **kwargs)

    return whole_step


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


def _transferred(module: LightningModule, batch: Any) -> Any:
    """Return a batch as Lightning's loop prepares the first of a sample."""
    trainer = module.trainer
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _backward(trainer: Trainer, output: Any) -> None:
    loss = output if output is None or isinstance(output, Tensor) else output["loss"]
    if loss is None:
        return
    # Lightning's own backward pass is outside of autocast, too.
    with torch.autocast(loss.device.type, enabled=False):
        trainer.strategy.backward(loss, None)
