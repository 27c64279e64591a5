"""The ordinary layer: each use clips its input, and its upstream gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opacus_bpclip.clipping.base import Clip, Settings
from opacus_bpclip.clipping.ops import clip_input, clip_upstream, scale_input
from opacus_bpclip.guard.call_checks import changed_inputs, earlier_hook, versions, wrong_batch
from opacus_bpclip.model.calls import Args, Kwargs
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.rules import Inputs, Prepared


class SingleClip(Clip):
    """The two hooks of one layer."""

    def __init__(self, layer: Layer, settings: Settings) -> None:
        self.layer = layer
        self.config, self.guard, self.mean = settings.config, settings.guard, settings.mean
        self.limit = settings.limits[layer.name]
        self.clipped: Prepared | None = None
        self.passed: Inputs = ()
        self.versions: tuple[int, ...] = ()
        self.followed = False
        self.key = 0

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks: input clipping the last of all, upstream clipping the first.

        Nothing may stand between the layer and its clips.
        """
        module = self.layer.module
        before = module.register_forward_pre_hook(self.enter, with_kwargs=True)
        after = module.register_forward_hook(self.leave, with_kwargs=True, prepend=True)
        self.key = after.id
        return [before, after]

    def enter(self, _: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Clip the inputs."""
        rule, arguments = self.layer.rule, self.layer.arguments
        max_norm = self.config.max_input_norm
        inputs = arguments.get(args, kwargs)
        if not torch.is_grad_enabled():
            if max_norm is None or not rule.clips_input:
                return None
            return arguments.put(args, kwargs, scale_input(inputs, rule, max_norm))
        compiling = torch.compiler.is_compiling()
        if compiling:  # pragma: no cover (torch.compile traces it, unseen by coverage)
            self.guard.note_compiled()
        else:
            self.followed = self.guard.enter_layer(self.layer)
            if self.followed:
                self.guard.require(wrong_batch(self.layer, inputs, self.guard.examples))
        self.clipped = clip_input(inputs, rule, max_norm, mean=self.mean)
        args, kwargs = arguments.put(args, kwargs, self.clipped.inputs)
        if not compiling:
            self.passed = arguments.passed(args, kwargs)
            self.versions = versions(self.passed)
        return args, kwargs

    def leave(self, module: nn.Module, args: Args, kwargs: Kwargs, y: Tensor) -> Tensor | None:
        """Clip the upstream gradient."""
        clipped, self.clipped = self.clipped, None
        passed, self.passed = self.passed, ()
        if not torch.is_grad_enabled() or not y.requires_grad:
            return None
        assert clipped is not None
        if not torch.compiler.is_compiling():
            used = self.layer.arguments.passed(args, kwargs)
            self.guard.require(changed_inputs(self.layer, passed, self.versions, used))
            self.guard.require(earlier_hook(self.layer, self.key))
            if self.followed:
                self.guard.check_output(self.layer, y)
                self.guard.follow(self.layer, y, used)
        out = clip_upstream(
            y,
            clipped,
            self.layer.rule,
            self.limit,
            bound=self.config.bound,
            upstream=self.config.upstream,
            max_norm=self.config.max_input_norm,
            batch_axis=self.layer.arguments.batch_axis,
            mean=self.mean,
        )
        if self.followed and not torch.compiler.is_compiling():
            self.guard.join(self.layer, out, y)
        return out
