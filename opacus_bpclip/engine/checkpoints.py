"""Opacus's checkpoints, extended: the settings, all steps once, and no number drawn twice.

As in `opacus_bpclip.engine.extensions`, each public function extends the engine's method of the
same name, and gets the bound original as its first argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import opacus
import torch

from opacus_bpclip.engine import account
from opacus_bpclip.engine.account import Account
from opacus_bpclip.engine.sources import sources_of
from opacus_bpclip.optimizer import fingerprint

Original = Callable[..., Any]

_ACCOUNT = "_backprop_account"


def save_checkpoint(
    original: Original,
    engine: opacus.PrivacyEngine,
    *,
    checkpoint_dict: dict[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """Extend ``save_checkpoint``; see `PrivacyEngine.save_checkpoint`."""
    own: dict[str, Any] = {account.KEY: account_of(engine).state()}
    settings = _settings(engine)
    if settings is not None:
        own[fingerprint.KEY] = settings
    original(checkpoint_dict={**(checkpoint_dict or {}), **own}, **kwargs)


def load_checkpoint(
    original: Original, engine: opacus.PrivacyEngine, *, optimizer: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """Extend ``load_checkpoint``; see `PrivacyEngine.load_checkpoint`."""
    own, present = account_of(engine), engine.accountant.history
    before = own.segments()
    saved: dict[str, Any] = {}
    try:
        checkpoint: dict[str, Any] = original(optimizer=optimizer, **kwargs)
        saved = checkpoint.pop(account.KEY, {})
    except Exception:
        saved = _segments_in(**kwargs)
        raise
    finally:
        # Opacus loads the accountant before the optimizer, which may refuse its state.
        if engine.accountant.history is not present:
            own.keep(before, saved)
            sources_of(engine).resume()
    settings = _settings(engine)
    # If an optimizer is loaded, it has compared the settings already.
    if optimizer is None and settings is not None:
        fingerprint.compare(checkpoint.get(fingerprint.KEY), settings)
    return checkpoint


def _segments_in(
    *, path: Any = None, torch_load_kwargs: dict[str, Any] | None = None, **_: Any
) -> dict[str, Any]:
    """Return the segments of a checkpoint that could not be loaded as a whole, if any."""
    if hasattr(path, "seek"):
        path.seek(0)
    try:
        found: dict[str, Any] = torch.load(
            path, **(torch_load_kwargs or {}), weights_only=False
        ).get(account.KEY, {})
    except Exception:  # whatever was wrong with the file, the caller is told
        return {}
    return found


def account_of(engine: opacus.PrivacyEngine) -> Account:
    """Return the account of an engine's present accountant."""
    own: Account | None = getattr(engine, _ACCOUNT, None)
    if own is None or own.accountant is not engine.accountant:
        own = Account(engine.accountant)
        setattr(engine, _ACCOUNT, own)
    return own


def _settings(engine: opacus.PrivacyEngine) -> fingerprint.Settings | None:
    """Return the settings of the latest call with ``clipping="backprop"``, or ``None``."""
    latest = sources_of(engine).latest
    return None if latest is None else latest._settings()
