"""Recurrent networks: their linear layers are called once per time step, and clipped once.

The gradient of such a layer is ``sum_t g_t u_t^T``, that of one linear layer over a sequence with
the time steps as positions. So all time steps share one scope, also where each layer has a budget
of its own. The gradient that flows on to the layers below is then not clipped. (To clip each step
to its share of the limit would be valid, too, but would clip far too much.) Proof:
``docs/rules/recurrent.md``.
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

# PyTorch shows this text under fullgraph=True.
RECURRENT_IS_EAGER = (
    "a private recurrent network is a loop over time steps, which runs in eager mode: without "
    'fullgraph=True, BackpropClipping(allocation="equal") compiles the layers around it'
)


class RecurrentClip(Clip):
    """Clips the layers of one recurrent network.

    Args:
        layers: the trainable linear layers of the network.
        settings: the settings of the clipping.

    Attributes:
        running: whether the network's forward is running.
        batch_size: the number of examples; a step of packed sequences may have fewer rows.
        order: ``[B]``, the row of each example if packed sequences were sorted by length.
        scopes: the layers' scopes by name; empty in activation checkpointing's second run.
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
        """Register the network's hooks, which open and close the scopes, and the layers' hooks."""
        handles = [
            self.network.register_forward_pre_hook(self.enter, with_kwargs=True),
            self.network.register_forward_hook(self.leave, always_call=True),
        ]
        for step in self.steps:
            handles += step.attach()
        return handles

    @torch.compiler.disable(reason=RECURRENT_IS_EAGER)
    def enter(self, network: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Open the scopes of one forward pass of the network."""
        if not torch.is_grad_enabled():
            return
        layers = [step.layer for step in self.steps]
        name = layers[0].name.removesuffix(_below(network, layers[0].module))
        if not aligns_rows(network):
            self.guard.fail(
                f"{name} was changed after make_private. It is not known any more whether its rows "
                "are the same examples at every time step. Change the model first, then call "
                "make_private."
            )
        followed = [self.guard.enter_layer(layer) for layer in layers]
        x = args[0] if args else kwargs["input"]
        axis = 0 if network.batch_first else 1
        shape = tuple(x.data.shape if is_packed(x) else x.shape)
        if not is_packed(x) and len(shape) != 3:
            self.guard.fail(
                f"{name} got an input of shape {shape}, but needs 3 axes, of which the "
                f"{('first', 'second')[axis]} is the batch. Add the batch axis."
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
        """Close the scopes, also after an error."""
        for scope in self.scopes.values():
            if not self.steps[0].budget.joint:
                scope.close()
        self.scopes = {}
        self.running, self.order = False, None


class _Run(NamedTuple):
    """What the backward pass of a time step needs to know about the network's forward pass.

    Attributes:
        batch_size: the number of examples.
        order: ``[B]``, the row of each example if packed sequences were sorted by length.
    """

    batch_size: int
    order: Tensor | None


class _Step(FusedClip):
    """The hooks of one layer, which is called once per time step."""

    def __init__(self, layer: Layer, run: RecurrentClip, settings: Settings) -> None:
        super().__init__(layer, settings)
        self.run = run

    @torch.compiler.disable(reason=RECURRENT_IS_EAGER)
    def enter(self, _: nn.Module, args: Args) -> None:
        """Check that the network is running; its hook has counted the call."""
        if torch.is_grad_enabled() and not self.run.running:
            self.guard.fail(
                f"{self.layer.name} was called outside its recurrent network. It cannot be known "
                "which example a row belongs to. Call the network instead."
            )
        self.followed = torch.is_grad_enabled() and self.layer.name in self.run.scopes
        self.functions.pause()

    @torch.compiler.disable(reason=RECURRENT_IS_EAGER)
    def leave(self, module: nn.Module, args: Args, kwargs: Kwargs, y: Tensor) -> Tensor | None:
        """Replace the layer's graph by the node."""
        return super().leave(module, args, kwargs, y)

    def check(self, args: Args, kwargs: Kwargs, y: Tensor) -> None:
        """Check the output; the network's hook has checked the rows."""
        self.guard.check_output(self.layer, y)

    def call(self, module: nn.Module, args: Args, kwargs: Kwargs, y: Tensor) -> Call:
        """Add the batch size and the order of the examples to the call."""
        return (
            super()
            .call(module, args, kwargs, y)
            ._replace(graph=_Run(self.run.batch_size, self.run.order))
        )

    def use(
        self, g: Tensor, graph: Any, saved: Inputs, target: Target, wants: tuple[bool, ...]
    ) -> Use:
        """Return the use, with the order of the examples in packed sequences."""
        use = super().use(g, graph, saved, target, wants)
        assert isinstance(use, FusedUse)
        order = graph.order
        return use if order is None else use.sorted_by(order)

    def scope(self) -> Scope:
        """Return the layer's scope, which all time steps share."""
        return self.run.scopes[self.layer.name]

    def examples_of(self, g: Tensor, graph: Any) -> int:
        """Return the batch size if the loss is a mean; a time step may have fewer rows."""
        return int(graph.batch_size) if self.mean else 1


def _below(network: nn.Module, layer: nn.Module) -> str:
    return next(f".{name}" for name, module in network.named_modules() if module is layer)
