"""The privacy settings that a checkpoint was saved under, compared when it is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from opacus_bpclip.config import BackpropClipping

KEY = "privacy_settings"

Settings = Mapping[str, object]


def settings_of(
    config: BackpropClipping,
    *,
    noise_multiplier: float,
    max_grad_norm: float,
    sample_rate: float | None,
    expected_batch_size: float | None,
    loss_reduction: str,
) -> Settings:
    """Return the settings that decide how much a step spends and computes, as plain values."""
    return {
        "noise_multiplier": noise_multiplier,
        "max_grad_norm": max_grad_norm,
        "sample_rate": sample_rate,
        "expected_batch_size": expected_batch_size,
        "loss_reduction": loss_reduction,
        "bound": config.bound,
        "max_input_norm": config.max_input_norm,
        "allocation": _plain(config.allocation),
        "normalize": config.normalize,
        "stability": config.stability,
        "threshold": repr(config.threshold),
        "layer_noise": _plain(config.layer_noise),
        "propagate": config.propagate,
        "whitening": _of_whitening(config),
        "uses": _plain(config.uses),
    }


def compare(saved: Settings | None, present: Settings) -> None:
    """Warn if a checkpoint is loaded under other settings than it was saved under.

    Args:
        saved: the checkpoint's settings; ``None`` for a checkpoint of another optimizer.
        present: the settings that training would go on with.
    """
    if saved is None:
        return
    changed = [
        f"{name} was {saved[name]!r} and is {value!r}"
        for name, value in present.items()
        if name in saved and saved[name] != value
    ]
    if changed:
        warnings.warn(
            f"The checkpoint was saved under other settings: {'; '.join(changed)}. The accountant "
            "keeps the steps under the old settings and adds new steps under the new ones. If that "
            "is not what you want, train with the old settings, and load again.",
            stacklevel=3,
        )


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value


def _of_whitening(config: BackpropClipping) -> object:
    """Return its numbers: a function that makes public examples has another address each time."""
    own = config.whitening
    if own is None:
        return None
    return (own.power, own.damping, own.rank, own.every, own.max_size)
