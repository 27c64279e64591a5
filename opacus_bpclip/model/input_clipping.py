"""Input clipping as a part of the model, independent of how it is trained.

It acts like a normalisation without parameters. So a model that was trained with it also needs it
in evaluation, after export, and in any comparison with another clipping method.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from opacus_bpclip.config import is_positive_number
from opacus_bpclip.model.calls import Args, CallArguments, Kwargs
from opacus_bpclip.model.coverage import trainable_layers
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.model.saved_norms import NAME, SavedNorm, is_saved_norm
from opacus_bpclip.rules import Rule
from opacus_bpclip.rules.scaling import scale_input
from opacus_bpclip.rules.views import of_one_row


class InputClip:
    """A forward pre-hook that clips the inputs of one layer; it is pickled with the model.

    Args:
        rule: the layer's rule.
        arguments: the arguments of the layer's call that are the rule's inputs.
        max_norm: the largest L2 norm of a column of the input.
    """

    def __init__(self, rule: Rule, arguments: CallArguments, max_norm: float) -> None:
        self.rule = rule
        self.arguments = arguments
        self.max_norm = max_norm

    def __call__(self, _: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Replace the layer's inputs by their clipped values."""
        clipped = scale_input(self.arguments.get(args, kwargs), self.rule, self.max_norm)
        return self.arguments.put(args, kwargs, clipped)


def clip_inputs(model: nn.Module, max_input_norm: float, *, batch_first: bool = True) -> nn.Module:
    """Make every trainable layer of the model clip its input, in training and in evaluation.

    It is the clipping of ``BackpropClipping(max_input_norm=...)``, for any way of training. A
    second call replaces the first. `unclip_inputs` removes it. A model's ``state_dict`` then says
    so: a model that does not clip its inputs refuses to load it.

    Args:
        model: a model whose trainable layers all have a rule; changed in place.
        max_input_norm: the largest L2 norm of a column of a layer's input.
        batch_first: whether the batch is the first axis of the layers' inputs; otherwise the
            second.

    Returns:
        The model.

    Raises:
        ValueError: ``max_input_norm`` is not a finite number above zero.
        CoverageError: a trainable layer has no rule.

    Examples:
        >>> model = clip_inputs(nn.Sequential(nn.Linear(4, 2, bias=False)), 1.0)
        >>> model[0].weight.data.fill_(1.0).shape
        torch.Size([2, 4])
        >>> import torch
        >>> [round(v, 3) for v in model(torch.full((1, 4), 9.0))[0].tolist()]
        [2.0, 2.0]
    """
    if not is_positive_number(max_input_norm):
        raise ValueError(f"Expected max_input_norm={max_input_norm!r} to be a finite number > 0.")
    layers = trainable_layers(model, batch_first=batch_first)
    unclip_inputs(model)
    attach_input_clips(layers.values(), max_input_norm)
    return model


def unclip_inputs(model: nn.Module) -> nn.Module:
    """Remove the hooks of `clip_inputs`, if there are any; return the model."""
    remove_input_clips(model)
    return model


def attach_input_clips(layers: Iterable[Layer], max_input_norm: float) -> None:
    """Make these layers clip their inputs."""
    for layer in layers:
        if layer.rule.clips_input:
            # Each row is clipped by itself, so the clip need not know which rows are an example's,
            # and stays right in a model that is taken out of a `FoldViews`.
            arguments = replace(layer.arguments, fold=None)
            clip = InputClip(of_one_row(layer.rule), arguments, max_input_norm)
            layer.module.register_forward_pre_hook(clip, with_kwargs=True)
            SavedNorm(max_input_norm).attach(layer.module)


class RemovedClips:
    """Input clips that were removed from their modules; a call puts them back.

    Args:
        entries: what was in the modules' tables of hooks and attributes: the table, the key and the
            value.
    """

    def __init__(self, entries: list[tuple[dict[Any, Any], int | str, Any]]) -> None:
        self._entries = entries

    def __call__(self) -> None:
        """Put the clips back."""
        for table, key, value in self._entries:
            table[key] = value


def remove_input_clips(model: nn.Module) -> RemovedClips:
    """Remove every input clip from a model; call the result to put them back."""
    removed = [
        (table, key, table[key]) for module in model.modules() for table, key in _entries_of(module)
    ]
    for table, key, _ in removed:
        del table[key]
    return RemovedClips(removed)


def _entries_of(module: nn.Module) -> Iterator[tuple[dict[Any, Any], int | str]]:
    if NAME in vars(module):
        yield vars(module), NAME
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, InputClip):
            yield module._forward_pre_hooks, key
            yield module._forward_pre_hooks_with_kwargs, key
    for table in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, hook in table.items():
            if is_saved_norm(hook):
                yield table, key
