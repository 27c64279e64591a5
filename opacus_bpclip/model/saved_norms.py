"""The norm of clipped inputs in a layer's state, which layers without the clipping refuse to load.

Weights that were trained with clipped inputs compute something else without them, and a state holds
weights alone. So it gets an entry more, by which ``load_state_dict`` raises an error unless the
layer clips its inputs, too.

The entry is an attribute of the layer, as all others are: ``torch.func.functional_call`` and
``torch.distributed.checkpoint`` look up each entry of a state in the model. It is no buffer, since
wrappers broadcast, shard and convert those. Torch's own key for more than tensors,
``_extra_state``, would refuse as well, but its name tells nobody what is missing.
"""

from __future__ import annotations

import warnings
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

NAME = "clip_inputs_max_input_norm"

State = MutableMapping[str, Any]


class SavedNorm:
    """Writes a layer's norm into its state, and takes it out of a state that is loaded.

    Args:
        max_norm: the largest L2 norm of a column of the layer's input.
    """

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def attach(self, layer: nn.Module) -> list[RemovableHandle]:
        """Register the hooks and set the attribute; they are copied and pickled with the layer.

        The attribute stays when the hooks are removed: alone it does nothing.
        """
        setattr(layer, NAME, torch.tensor(self.max_norm))
        return [
            layer.register_state_dict_post_hook(self),
            layer.register_load_state_dict_pre_hook(self.read),
        ]

    def __call__(self, _: nn.Module, state: State, prefix: str, *__: Any) -> None:
        """Write the norm."""
        state[prefix + NAME] = torch.tensor(self.max_norm)

    def read(self, _: nn.Module, state: State, prefix: str, *__: Any) -> None:
        """Take the norm out; warn if it is another one. Weights of a model without it may load."""
        saved = state.pop(prefix + NAME, None)
        # Weights may have been saved in low precision, this number with them.
        if saved is not None and saved != torch.tensor(self.max_norm, dtype=saved.dtype):
            warnings.warn(
                f"The weights of {prefix.rstrip('.') or 'the model'} were saved with inputs "
                f"clipped to {float(saved):.4g}, and are loaded where they are clipped to "
                f"{self.max_norm:.4g}. Call opacus_bpclip.clip_inputs(model, {float(saved):.4g}).",
                stacklevel=2,
            )


def is_saved_norm(hook: object) -> bool:
    """Return whether a hook of a module's state is one of these."""
    function = getattr(hook, "hook", hook)  # torch wraps those of loading
    return isinstance(getattr(function, "__self__", function), SavedNorm)
