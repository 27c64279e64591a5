"""Options of Lightning's ``Trainer`` that private training refuses."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
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
_STRATEGY = (
    "wraps model and optimizer itself, without the private sum over processes. Pass "
    'strategy="ddp" for a copy of the model on each process, or devices=1. For shards, write the '
    "loop, and use fully_shard as in docs/many-devices.md."
)
