"""Options of Lightning's ``Trainer`` that private training refuses."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.strategies import SingleDeviceStrategy

from opacus_bpclip.integrations.lightning.replicas import Replicas
from opacus_bpclip.integrations.refusals import GRAD_SCALER


def refuse_options(options: dict[str, Any]) -> None:
    """Refuse options that do not go with private training.

    Args:
        options: of Lightning's ``Trainer``.

    Raises:
        ValueError: there is such an option; the message says why, and what to do instead.
    """
    precision = options.get("precision")
    for name, is_set, text in (
        (f"precision={precision!r}", str(precision) in ("16", "16-mixed"), _SCALED),
        ("gradient_clip_val", options.get("gradient_clip_val") is not None, _CLIPPED),
        ("accumulate_grad_batches", options.get("accumulate_grad_batches", 1) != 1, _ACCUMULATED),
        (
            "reload_dataloaders_every_n_epochs",
            options.get("reload_dataloaders_every_n_epochs", 0) != 0,
            _RELOADED,
        ),
    ):
        if is_set:
            raise ValueError(f"{name} {text}")


def refuse_strategy(trainer: Trainer) -> None:
    """Refuse strategies that wrap the model or reduce gradients themselves.

    Args:
        trainer: a trainer that has chosen its strategy.

    Raises:
        ValueError: it has chosen such a strategy.
    """
    if not isinstance(trainer.strategy, (Replicas, SingleDeviceStrategy)):
        raise ValueError(f"{type(trainer.strategy).__name__} {_STRATEGY}")


def refuse_callbacks(callbacks: Sequence[Callback], own: Callback) -> None:
    """Refuse callbacks with which a fit would not be private; ``Tuner`` inserts such ones.

    Args:
        callbacks: of a trainer that begins a fit.
        own: the one that makes the fit private.

    Raises:
        ValueError: one of them trains by itself, or their own is missing.
    """
    for callback in callbacks:
        if isinstance(callback, (BatchSizeFinder, LearningRateFinder)):
            raise ValueError(f"{type(callback).__name__} {_FINDER}")
    if own not in callbacks:
        raise ValueError(f"trainer.callbacks {_REPLACED}")


def refuse_no_steps(trainer: Trainer) -> None:
    """Refuse a fit that trains on nothing.

    Raises:
        ValueError: it would.
    """
    if trainer.limit_train_batches == 0:
        raise ValueError(
            "limit_train_batches=0 leaves no step, so there is nothing to train privately. Pass "
            "a larger one, or call trainer.validate to evaluate."
        )


def refuse_iterator(module: LightningModule) -> None:
    """Refuse a ``training_step`` that draws its batches itself.

    Raises:
        ValueError: it does.
    """
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise ValueError(f"{type(module).__name__}.training_step(dataloader_iter) {_ITERATOR}")


_SCALED = f'{GRAD_SCALER} Train with precision="bf16-mixed", or in float32.'
_CLIPPED = (
    "would clip the batch's gradient once more, after the noise. Each example's gradient is "
    "clipped: pass max_grad_norm instead."
)
_ACCUMULATED = (
    "would add up several Poisson samples before a step, and one example may be in two of them. "
    "Make the data loader's batch_size as many times larger, and pass max_physical_batch_size, the "
    "largest number of examples in memory at once."
)
_RELOADED = (
    "would replace the private data loader by another one, whose samples the accountant does not "
    "know. Leave it out: each epoch draws new samples."
)
_FINDER = (
    "would train by itself, without clipping and noise, and what it finds would depend on the "
    "private data. Leave it out, and do not pass a PrivateTrainer to Tuner: find learning rate and "
    "batch size on public data, with Lightning's Trainer."
)
_REPLACED = (
    "lacks the callback that makes a fit private. Pass your callbacks to PrivateTrainer(callbacks="
    "...), or append them to trainer.callbacks, instead of replacing the list."
)
_ITERATOR = (
    "draws any number of samples for one step, but each step is accounted as one Poisson sample. "
    "Take the batch as an argument: training_step(batch, batch_idx)."
)
_STRATEGY = (
    "wraps model and optimizer itself, without the private sum over processes. Pass "
    'strategy="ddp" for a copy of the model on each process, or devices=1. For shards, write the '
    "loop, and use fully_shard as in docs/many-devices.md."
)
