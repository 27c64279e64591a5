"""Layers whose gradient is known in closed form: one autograd node stands in the layer's place.

The layer runs as it is. Its part of the graph is dropped and replaced by a node that makes the
clipped gradient itself, reads activations and gradients as few times as it can, and keeps nothing
that the layer does not keep but a map of norms.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opacus_bpclip.clipping.base import Clip, Settings
from opacus_bpclip.guard.call_checks import earlier_hook, wrong_batch
from opacus_bpclip.guard.provenance import Receipt
from opacus_bpclip.model.calls import Args, Kwargs
from opacus_bpclip.model.layer import Layer


class NodeClip(Clip):
    """The hooks of one layer.

    Args:
        layer: the layer; it takes one tensor.
        settings: how to clip.

    Attributes:
        scales_output: whether the layer's output changes, and so in evaluation, too.
    """

    def __init__(self, layer: Layer, settings: Settings) -> None:
        self.layer = layer
        self.config, self.guard, self.mean = settings.config, settings.guard, settings.mean
        self.limit = settings.limits[layer.name]
        self.normalize = self.config.upstream == "normalize"
        self.scales_output = False
        self._key = 0
        self._followed = False

    @abstractmethod
    def node(self, module: nn.Module, x: Tensor, y: Tensor, receipt: Receipt | None) -> Tensor:
        """Return the layer's output with the node behind it.

        Args:
            module: the layer.
            x: its input, batch first.
            y: what it made, without a graph; may be changed in place.
            receipt: for the node to `sign`.
        """

    def sign(self, receipt: Receipt | None, weight: Tensor | None, bias: Tensor | None) -> None:
        """Sign for the gradients that the node is about to send.

        Args:
            receipt: the node's; ``None`` where nobody watches.
            weight: the weight's gradient, ``None`` for none.
            bias: the bias's.
        """
        if receipt is not None:
            gradients = {"weight": weight, "bias": bias}
            receipt.sign([gradients[name] for name in self.layer.named_parameters])

    def unscaled_limit(self) -> Tensor | float:
        """Return the limit of gradients that are clipped only, 0 where they are scaled up to it."""
        if self.normalize:
            return 0.0
        return self.limit if torch.compiler.is_compiling() else self.limit.item()

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks; the second is the first after the layer, nothing may come between."""
        module = self.layer.module
        before = module.register_forward_pre_hook(self.enter)
        after = module.register_forward_hook(self.leave, with_kwargs=True, prepend=True)
        self._key = after.id
        return [before, after]

    def enter(self, _: nn.Module, args: Args) -> None:
        """Let the guard see the layer before it runs."""
        self._followed = False
        if not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling():  # pragma: no cover (traced, unseen by coverage)
            self.guard.note_compiled()
            return
        self._followed = self.guard.enter_layer(self.layer)

    def leave(self, module: nn.Module, args: Args, kwargs: Kwargs, y: Tensor) -> Tensor | None:
        """Put the node in the place of the layer's part of the graph."""
        followed, self._followed = self._followed, False
        if not torch.is_grad_enabled() and not self.scales_output:
            return None
        inputs = self.layer.arguments.get(args, kwargs)
        (x,) = inputs
        assert x is not None
        receipt = None
        if followed:
            self.guard.require(earlier_hook(self.layer, self._key))
            self.guard.require(wrong_batch(self.layer, inputs, self.guard.examples))
            self.guard.check_output(self.layer, y)
            receipt = self.guard.expect(self.layer)
        return self.node(module, x, y.detach(), receipt)
