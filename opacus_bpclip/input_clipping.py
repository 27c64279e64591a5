"""Input clipping on its own: the part of the method that belongs to the model.

It acts like a parameter-free normalisation, so a model trained with it needs it in evaluation,
after export, and in any comparison with another clipping method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from opacus_bpclip.config import is_positive_number
from opacus_bpclip.coverage import Layer, trainable_layers
from opacus_bpclip.ops import scale_input
from opacus_bpclip.rules import Rule


class InputClip:
    """A forward pre-hook that clips the input of one layer; picklable with its model.

    Args:
        rule: the layer's rule.
        max_norm: largest L2 norm of a column of the input.
    """

    def __init__(self, rule: Rule, max_norm: float) -> None:
        self.rule = rule
        self.max_norm = max_norm

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replace the layer's input by its clipped value."""
        clipped = scale_input(layer_input(args, kwargs), self.rule, self.max_norm)
        return with_input(args, kwargs, clipped)


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the one input of a layer's call, passed by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a layer's call with another input."""
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): x}


def clip_inputs(model: nn.Module, max_input_norm: float) -> nn.Module:
    """Make every trainable layer of the model clip its input, in training and in evaluation.

    The same clipping as ``BackpropClipping(max_input_norm=...)``, for any way of training; a
    second call replaces the first. `unclip_inputs` takes it away.

    Args:
        model: a model whose trainable layers all have a rule; changed in place.
        max_input_norm: largest L2 norm of a column of a layer's input.

    Returns:
        The model.

    Raises:
        ValueError: ``max_input_norm`` is not a finite number above zero.
        CoverageError: a trainable layer has no rule.

    Example:
        >>> model = clip_inputs(nn.Sequential(nn.Linear(4, 2, bias=False)), 1.0)
        >>> model[0].weight.data.fill_(1.0).shape
        torch.Size([2, 4])
        >>> import torch
        >>> [round(v, 3) for v in model(torch.full((1, 4), 9.0))[0].tolist()]
        [2.0, 2.0]
    """
    if not is_positive_number(max_input_norm):
        raise ValueError(f"Expected max_input_norm={max_input_norm!r} to be a finite number > 0.")
    layers = trainable_layers(model)
    unclip_inputs(model)
    attach_input_clips(layers.values(), max_input_norm)
    return model


def unclip_inputs(model: nn.Module) -> nn.Module:
    """Take the effect of `clip_inputs` away; harmless where there is none."""
    take_input_clips(model)
    return model


def attach_input_clips(layers: Iterable[Layer], max_input_norm: float) -> None:
    """Make these layers clip their inputs."""
    for layer in layers:
        if layer.rule.clips_input:
            clip = InputClip(layer.rule, max_input_norm)
            layer.module.register_forward_pre_hook(clip, with_kwargs=True)


def take_input_clips(model: nn.Module) -> Callable[[], None]:
    """Take every input clip off a model; return what puts them back as they were."""
    taken = [
        (module, key, hook)
        for module in model.modules()
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, InputClip)
    ]
    for module, key, _ in taken:
        del module._forward_pre_hooks[key]
        del module._forward_pre_hooks_with_kwargs[key]

    def put_back() -> None:
        for module, key, hook in taken:
            module._forward_pre_hooks[key] = hook
            module._forward_pre_hooks_with_kwargs[key] = True

    return put_back
