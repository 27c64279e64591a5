"""Recurrent networks: a layer of theirs is used once a time step, and clipped once.

The layer's gradient is ``sum_t g_t u_t^T``: the gradient of one linear layer over a sequence, with
time steps for positions. Clipping each step to a part of the limit would be a bound as well, and a
bad one. So all steps are in one scope, also where each layer has a budget of its own; what flows on
to the layers below is then not clipped. Proof: ``docs/rules/recurrent.md``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opacus_bpclip.clipping.base import Clip, Settings
from opacus_bpclip.clipping.factors import Target
from opacus_bpclip.clipping.fused import FusedClip
from opacus_bpclip.clipping.fused_use import FusedUse
from opacus_bpclip.clipping.node import Call
from opacus_bpclip.clipping.scope import Scope
from opacus_bpclip.clipping.use import Use
from opacus_bpclip.guard.call_checks import wrong_rows
from opacus_bpclip.model.calls import Args, Kwargs
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.model.recurrence import aligns_rows, is_packed
from opacus_bpclip.rules import Inputs

# Shown by torch, where it is asked for one graph.
RECURRENT_IS_EAGER = (
    "a private recurrent network is a loop over time steps that is left to eager mode: without "
    'fullgraph=True, BackpropClipping(allocation="equal") compiles the layers around it'
)


class RecurrentClip(Clip):
    """Clips the layers of one recurrent network.

    Args:
        layers: its trainable linear layers.
        settings: how to clip.

    Attributes:
        running: whether the network runs.
        batch_size: over how many examples; a step of packed sequences may have fewer rows.
        order: ``[B]``, the row of each example, where packed sequences were sorted by length.
        scopes: of the layers, by name; empty in activation checkpointing's second run.
    """

    def __init__(self, layers: list[Layer], settings: Settings) -> None:
        self.guard = settings.guard
        self.running = False
        self.batch_size = 0
        self.order: Tensor | None = None
        self.scopes: dict[str, Scope] = {}
        self.steps = [_Step(layer, self, settings) for layer in layers]
        network = layers[0].recurrence
        assert network is not None
        self.network: nn.Module = network

    def attach(self) -> list[RemovableHandle]:
        """Register the network's hooks, which open and close the scopes, and the layers'."""
        handles = [
            self.network.register_forward_pre_hook(self.enter, with_kwargs=True),
            self.network.register_forward_hook(self.leave, always_call=True),
        ]
        for step in self.steps:
            handles += step.attach()
        return handles

    @torch.compiler.disable(reason=RECURRENT_IS_EAGER)
    def enter(self, network: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Open the scopes of a run."""
        if not torch.is_grad_enabled():
            return
        layers = [step.layer for step in self.steps]
        name = layers[0].name.removesuffix(_below(network, layers[0].module))
        if not aligns_rows(network):
            self.guard.fail(
                f"{name} was changed after make_private: nothing shows that its rows are still the "
                "same examples at every time step. Change the model first, then call make_private."
            )
        followed = [self.guard.enter_layer(layer) for layer in layers]
        x = args[0] if args else kwargs["input"]
        axis = 0 if network.batch_first else 1
        shape = tuple(x.data.shape if is_packed(x) else x.shape)
        if not is_packed(x) and len(shape) != 3:
            self.guard.fail(
                f"{name} got an input of shape {shape}; it needs 3 axes, the batch "
                f"{('first', 'second')[axis]}. Add the batch axis."
            )
        self.batch_size = int(x.batch_sizes[0]) if is_packed(x) else shape[axis]
        self.order = x.unsorted_indices if is_packed(x) else None
        self.running = True
        if all(followed):
            examples = self.guard.examples
            self.guard.require(wrong_rows(name, shape, self.batch_size, examples, axis))
            self.scopes = {
                step.layer.name: step.budget.scope_of(step.target, at_once=False)
                for step in self.steps
            }

    def leave(self, network: nn.Module, args: Args, output: Any) -> None:
        """End the run, also after an error."""
        for scope in self.scopes.values():
            if not self.steps[0].budget.joint:
                scope.close()
        self.scopes = {}
        self.running, self.order = False, None


class _Run(NamedTuple):
    """What a step's backward pass needs to know of the network's run.

    Attributes:
        batch_size: over how many examples it is.
        order: ``[B]``, the row of each example, where packed sequences were sorted by length.
    """

    batch_size: int
    order: Tensor | None


class _Step(FusedClip):
    """The hooks of one layer, called once a time step."""

    def __init__(self, layer: Layer, run: RecurrentClip, settings: Settings) -> None:
        super().__init__(layer, settings)
        self.run = run

    @torch.compiler.disable(reason=RECURRENT_IS_EAGER)
    def enter(self, _: nn.Module, args: Args) -> None:
        """Check that the network runs; it has been counted."""
        if torch.is_grad_enabled() and not self.run.running:
            self.guard.fail(
                f"{self.layer.name} was called outside its recurrent network, where nothing shows "
                "which example a row belongs to. Call the network."
            )
        self.followed = torch.is_grad_enabled() and self.layer.name in self.run.scopes
        self.functions.pause()

    @torch.compiler.disable(reason=RECURRENT_IS_EAGER)
    def leave(self, module: nn.Module, args: Args, kwargs: Kwargs, y: Tensor) -> Tensor | None:
        """Put the node in the place of the layer's part of the graph."""
        return super().leave(module, args, kwargs, y)

    def check(self, args: Args, kwargs: Kwargs, y: Tensor) -> None:
        """Check the output; the rows were checked when the network began."""
        self.guard.check_output(self.layer, y)

    def call(self, module: nn.Module, args: Args, kwargs: Kwargs, y: Tensor) -> Call:
        """Note over how many examples the network runs."""
        return (
            super()
            .call(module, args, kwargs, y)
            ._replace(graph=_Run(self.run.batch_size, self.run.order))
        )

    def use(
        self, g: Tensor, graph: Any, saved: Inputs, target: Target, wants: tuple[bool, ...]
    ) -> Use:
        """Take the upstream gradient, and note where the examples are in packed sequences."""
        use = super().use(g, graph, saved, target, wants)
        assert isinstance(use, FusedUse)
        order = graph.order
        return use if order is None else use.sorted_by(order)

    def scope(self) -> Scope:
        """Return the run's."""
        return self.run.scopes[self.layer.name]

    def examples_of(self, g: Tensor, graph: Any) -> int:
        """Return by what the loss has divided: the examples of the batch, not of this step."""
        return int(graph.batch_size) if self.mean else 1


def _below(network: nn.Module, layer: nn.Module) -> str:
    return next(f".{name}" for name, module in network.named_modules() if module is layer)
