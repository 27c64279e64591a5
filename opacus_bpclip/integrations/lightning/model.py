"""Which module of a ``LightningModule`` is the model that is trained privately."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from torch import nn


def model_of(module: LightningModule) -> nn.Module:
    """Return the module whose call is the forward pass.

    Args:
        module: the user's. Its own ``forward``, if it has one, is the forward pass; otherwise that
            of the only module in it that has trainable parameters.

    Raises:
        ValueError: neither is there.
    """
    if type(module).forward is not LightningModule.forward:
        return module
    holders = {
        name: child
        for name, child in module.named_children()
        if any(p.requires_grad for p in child.parameters())
    }
    if len(holders) == 1 and not any(p.requires_grad for p in module.parameters(recurse=False)):
        return next(iter(holders.values()))
    name = type(module).__name__
    raise ValueError(
        f"{name} has no forward, and its trainable parameters are not in one module but in "
        f"{', '.join([*holders, 'itself'])}, so it is unknown which call is the forward pass. "
        f"Define {name}.forward, which runs the whole model, and call self(...) in training_step."
    )
