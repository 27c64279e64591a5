"""Add ``clipping="backprop"`` to Opacus's own ``PrivacyEngine``, and remove it again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import opacus

from opacus_bpclip.engine import checkpoints, extensions
from opacus_bpclip.engine.engine import PrivacyEngine

_EXTENSIONS: dict[str, Callable[..., Any]] = {
    "make_private": extensions.make_private,
    "make_private_with_epsilon": extensions.make_private_with_epsilon,
    "_prepare_model": extensions.prepare_model,
    "_prepare_data_loader": extensions.prepare_data_loader,
    "_prepare_optimizer": extensions.prepare_optimizer,
    "save_checkpoint": checkpoints.save_checkpoint,
    "load_checkpoint": checkpoints.load_checkpoint,
}

_originals: dict[str, Callable[..., Any]] = {}


def register() -> None:
    """Make every ``opacus.PrivacyEngine`` accept ``clipping="backprop"``, also existing ones.

    It is for engines that other libraries create, and extends subclasses, too. Other values of
    ``clipping`` behave as before, except that ``load_checkpoint`` never makes the accountant forget
    steps. A second call does nothing.

    Examples:
        >>> register()
        >>> unregister()
    """
    if _originals:
        return
    for name, extension in _EXTENSIONS.items():
        _originals[name] = getattr(opacus.PrivacyEngine, name)
        setattr(opacus.PrivacyEngine, name, _extended(_originals[name], extension))


def unregister() -> None:
    """Undo `register` completely; do nothing without it."""
    while _originals:
        name, original = _originals.popitem()
        setattr(opacus.PrivacyEngine, name, original)


def _extended(original: Callable[..., Any], extension: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: opacus.PrivacyEngine, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, PrivacyEngine):  # is extended already, and calls what it extends
            return original(self, *args, **kwargs)
        return extension(functools.partial(original, self), self, *args, **kwargs)

    return method
