"""`BackpropClipModule`: a wrapped model with Opacus's module interface."""

from __future__ import annotations

from typing import Any

from opacus.grad_sample import AbstractGradSampleModule
from torch import nn

from opacus_bpclip.hooks import BackpropClipHooks


class BackpropClipModule(BackpropClipHooks, AbstractGradSampleModule):
    """A model with `BackpropClipHooks` attached, with Opacus's module interface.

    Args:
        m: the model.
        **options: the options of `BackpropClipHooks`.
    """

    def __init__(self, m: nn.Module, **options: Any) -> None:
        nn.Module.__init__(self)
        BackpropClipHooks.__init__(self, m, **options)
        self.grad_accumulation_hook = None

    def __getattr__(self, item: str) -> Any:
        """Return a submodule by its dotted name, as Opacus does, or an attribute of the model."""
        try:
            return super().__getattr__(item)
        except AttributeError:
            if item == "_module":  # not set yet, while this object is being copied
                raise
            return getattr(self._module, item)
