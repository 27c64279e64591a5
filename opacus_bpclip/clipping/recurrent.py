"""Recurrent networks: the gradient of all time steps together is clipped once.

A layer inside runs once a time step, and its gradient is ``sum_t g_t u_t^T``: the gradient of one
linear layer over a sequence, with time steps for positions. Clipping each step to a part of the
limit would be a bound as well, and a bad one. Instead, each step's backward keeps ``g_t`` and
passes on the unclipped input gradient; when the last one has run, `LinearRule` bounds the whole
sum, and one product gives the clipped gradient. Proof: ``docs/rules/recurrent.md``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opacus_bpclip.clipping.base import Clip, Settings
from opacus_bpclip.clipping.first_order import first_order
from opacus_bpclip.clipping.ops import clip_factors, clip_input, scale_input
from opacus_bpclip.guard.call_checks import wrong_rows
from opacus_bpclip.model.calls import Args, Kwargs
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.model.recurrence import aligns_rows, is_packed
from opacus_bpclip.rules import Prepared
from opacus_bpclip.rules.base import per_row, where_needed, zero_rows


class RecurrentClip(Clip):
    """Clips the layers of one recurrent network.

    Args:
        layers: its trainable linear layers.
        settings: how to clip.
    """

    def __init__(self, layers: list[Layer], settings: Settings) -> None:
        self.layers = layers
        self.settings = settings
        self.sequences: dict[str, _Sequence] = {}
        network = layers[0].recurrence
        assert network is not None
        self.network: nn.Module = network

    def attach(self) -> list[RemovableHandle]:
        """Register the network's hooks, which open and close the sequences, and the layers'."""
        handles = [
            self.network.register_forward_pre_hook(self.enter, with_kwargs=True),
            self.network.register_forward_hook(self.leave, always_call=True),
        ]
        for layer in self.layers:
            step = _Step(layer, self)
            handles.append(layer.module.register_forward_pre_hook(step.enter, with_kwargs=True))
            handles.append(
                layer.module.register_forward_hook(step.leave, with_kwargs=True, prepend=True)
            )
        return handles

    @torch.compiler.disable
    def enter(self, network: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Begin a sequence for each layer."""
        if not torch.is_grad_enabled():
            return
        guard = self.settings.guard
        name = self.layers[0].name.removesuffix(_below(network, self.layers[0].module))
        if not aligns_rows(network):
            guard.fail(
                f"{name} was changed after make_private: nothing shows that its rows are still the "
                "same examples at every time step. Change the model first, then call make_private."
            )
        followed = [guard.enter_layer(layer) for layer in self.layers]
        x = args[0] if args else kwargs["input"]
        axis = 0 if network.batch_first else 1
        shape = tuple(x.data.shape if is_packed(x) else x.shape)
        if not is_packed(x) and len(shape) != 3:
            guard.fail(
                f"{name} got an input of shape {shape}; it needs 3 axes, the batch "
                f"{('first', 'second')[axis]}. Add the batch axis."
            )
        batch_size = int(x.batch_sizes[0]) if is_packed(x) else shape[axis]
        if all(followed):
            guard.require(wrong_rows(name, shape, batch_size, guard.examples, axis))
        for layer, follow in zip(self.layers, followed, strict=True):
            sequence = _Sequence(layer, batch_size, self.settings)
            if follow:
                guard.check_output(layer, sequence.token)
                guard.follow(layer, sequence.token, ())
            self.sequences[layer.name] = sequence

    def leave(self, network: nn.Module, args: Args, output: Any) -> None:
        """End the sequences, also after an error."""
        self.sequences = {}


class _Step:
    """The two hooks of one layer, called once a time step."""

    def __init__(self, layer: Layer, clip: RecurrentClip) -> None:
        self.layer = layer
        self.clip = clip
        self.clipped: Prepared | None = None

    @torch.compiler.disable
    def enter(self, _: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Clip the input."""
        rule, max_norm = self.layer.rule, self.clip.settings.config.max_input_norm
        inputs = self.layer.arguments.get(args, kwargs)
        if not torch.is_grad_enabled():
            if max_norm is None:
                return None
            return self.layer.arguments.put(args, kwargs, scale_input(inputs, rule, max_norm))
        if self.layer.name not in self.clip.sequences:
            self.clip.settings.guard.fail(
                f"{self.layer.name} was called outside its recurrent network, where nothing shows "
                "which example a row belongs to. Call the network."
            )
        self.clipped = clip_input(inputs, rule, max_norm)
        return self.layer.arguments.put(args, kwargs, self.clipped.inputs)

    @torch.compiler.disable
    def leave(self, module: nn.Module, args: Args, kwargs: Kwargs, y: Tensor) -> Tensor | None:
        """Replace the layer's part of the graph by one that keeps the upstream gradient."""
        clipped, self.clipped = self.clipped, None
        if not torch.is_grad_enabled():
            return None
        assert clipped is not None
        (x,) = clipped.inputs
        sequence = self.clip.sequences[self.layer.name]
        weight = module._parameters["weight"]
        assert weight is not None
        return _Keep.apply(
            y.detach(), x, sequence.token, weight.detach(), clipped.norms, clipped.finite, sequence
        )


class _Kept(NamedTuple):
    """One time step: rows ``[B_t, ...]`` of the upstream gradient, the input and its norms."""

    g: Tensor
    x: Tensor
    norms: Tensor
    finite: Tensor


class _Sequence:
    """What one run of the network keeps of one layer until the gradient of all steps is known.

    Attributes:
        token: stands for the layer's parameters in the graph of every step.
        steps: in the order of the backward pass.
    """

    def __init__(self, layer: Layer, batch_size: int, settings: Settings) -> None:
        self.layer = layer
        self.config, self.limit = settings.config, settings.limits[layer.name]
        self.examples = batch_size if settings.mean else 1  # by what a mean loss divides
        self.steps: list[_Kept] = []
        weight, bias = (layer.module._parameters.get(name) for name in ("weight", "bias"))
        self.token: Tensor = _Sum.apply(self, weight, bias)

    def gradient(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the clipped sum over examples and steps, for weight and bias; forget the steps."""
        steps, self.steps = self.steps, []
        rows = max(len(step.g) for step in steps)
        g, x = (
            torch.stack([_padded(getattr(step, part), rows) for step in steps], dim=1)
            for part in ("g", "x")
        )
        g = g * self.examples
        norms = torch.cat([_padded(step.norms, rows) for step in steps], dim=2)
        finite = torch.stack([_padded(step.finite, rows, fill=True) for step in steps]).all(dim=0)
        rule, config = self.layer.rule, self.config
        bound = rule.bound(config.bound, g, (x,), norms, config.max_input_norm)
        normalize = config.upstream == "normalize"
        factor, keep = clip_factors(
            bound,
            where_needed(finite),
            self.limit,
            g.dtype,
            size=lambda: rule.size(config.bound, g, norms),
            normalize=normalize,
        )
        g = zero_rows(g * per_row(factor, g), keep).flatten(0, 1)
        x = zero_rows(x, keep).flatten(0, 1)
        return (g.T @ x if rule.weight else None, g.sum(dim=0) if rule.bias else None)


class _Sum(torch.autograd.Function):
    """Where the steps' graphs meet the parameters; its backward runs after the last of theirs."""

    @staticmethod
    def forward(ctx: Any, sequence: _Sequence, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.sequence = sequence
        return weight.new_zeros(())

    @staticmethod
    @first_order
    def backward(ctx: Any, _: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        return None, *ctx.sequence.gradient()


class _Keep(torch.autograd.Function):
    """A linear layer's step: the input gradient goes on, the upstream gradient is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        token: Tensor,
        weight: Tensor,
        norms: Tensor,
        finite: Tensor,
        sequence: _Sequence,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, norms, finite)
        ctx.sequence = sequence
        out = y.detach()
        if not bool(finite.all()):
            out.masked_fill_(~per_row(finite, out), float("nan"))
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, norms, finite = ctx.saved_tensors
        ctx.sequence.steps.append(_Kept(g, x, norms, finite))
        through = g @ weight if ctx.needs_input_grad[1] else None
        return None, through, g.new_zeros(()), None, None, None, None


def _padded(x: Tensor, rows: int, *, fill: bool = False) -> Tensor:
    if len(x) == rows:
        return x
    return torch.cat([x, x.new_full((rows - len(x), *x.shape[1:]), fill)])


def _below(network: nn.Module, layer: nn.Module) -> str:
    return next(f".{name}" for name, module in network.named_modules() if module is layer)
