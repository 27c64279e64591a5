"""Attach the rules to a model: `BackpropClipHooks`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from opacus.grad_sample import AbstractGradSampleHooks
from torch import nn

from opacus_bpclip.clipping import allocation
from opacus_bpclip.clipping.attach import frozen_normalizations, layer_clips, softmaxes
from opacus_bpclip.clipping.base import Settings
from opacus_bpclip.clipping.budget import Budget, target_of
from opacus_bpclip.clipping.functions import Functions
from opacus_bpclip.clipping.recurrent import RECURRENT_IS_EAGER
from opacus_bpclip.clipping.shared import SharedMeasurement
from opacus_bpclip.clipping.traced_form import note_form
from opacus_bpclip.config import BackpropClipping, is_positive_number
from opacus_bpclip.errors import CoverageError, PrivacyViolationError
from opacus_bpclip.guard.forms import form_of
from opacus_bpclip.guard.guard import GradientGuard
from opacus_bpclip.guard.ranks import Ranks
from opacus_bpclip.losses.criterion import BackpropClipCriterion
from opacus_bpclip.model.coverage import declared_uses, trainable_layers
from opacus_bpclip.model.functions import Followed
from opacus_bpclip.model.input_clipping import attach_input_clips, remove_input_clips
from opacus_bpclip.model.sharding import Presence, gathered, whole_parameters
from opacus_bpclip.model.tying import tied_groups
from opacus_bpclip.probe import Batch, Prober, batch_size
from opacus_bpclip.probe.ranks import TrialsOfRanks
from opacus_bpclip.sampling.log import SampleLog
from opacus_bpclip.sampling.padding import present_rows

_ATTACHED = "_backprop_clip_hooks"


class BackpropClipHooks(AbstractGradSampleHooks):
    """Make a model's ordinary gradients sums of bounded contributions, one per example.

    Guarantee: after one backward pass, ``p.grad`` of all trainable parameters together is a sum
    over the batch's examples; each term depends on its example and the parameters alone, and has
    norm at most ``max_grad_norm``, the part of layer ``l`` at most the optimizer's
    ``layer_sensitivities[l]``.

    Args:
        m: the model, changed in place by hooks; its layers stay what they are.
        config: how to clip.
        max_grad_norm: joint L2 sensitivity of the summed gradient.
        loss_reduction: ``"mean"`` or ``"sum"``, how the loss reduces over the batch.
        batch_first: whether the batch is the first axis of the inputs of the model and its layers,
            or the second.
        criterion: what every loss is computed by, if it keeps the batch's size out of the backward
            pass; its gradients are those of a sum, whatever ``loss_reduction`` is.
        ranks: which train the model together; all of them must call this.

    Raises:
        CoverageError: something in the model cannot be bounded, or it has hooks already. The model
            is left as it was.
    """

    def __init__(
        self,
        m: nn.Module,
        *,
        config: BackpropClipping | None = None,
        max_grad_norm: float = 1.0,
        loss_reduction: str = "mean",
        batch_first: bool = True,
        criterion: BackpropClipCriterion | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        # Not Opacus's own __init__: it gives every parameter a grad_sample.
        if hasattr(m, _ATTACHED):
            raise CoverageError(
                "The model has backpropagation clipping attached already. Call cleanup() on what "
                "make_private returned for it, or pass a fresh model. Several optimizers over one "
                "model go into one call: opacus_bpclip.SeveralOptimizers(one, other)."
            )
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f'Expected loss_reduction={loss_reduction!r} to be "mean" or "sum".')
        self.batch_first, self.loss_reduction = batch_first, loss_reduction
        whole = whole_parameters(m)
        with gathered(m):
            self._attach(m, config or BackpropClipping(), max_grad_norm, criterion, whole, ranks)

    def _attach(
        self,
        m: nn.Module,
        config: BackpropClipping,
        max_grad_norm: float,
        criterion: BackpropClipCriterion | None,
        whole: Mapping[nn.Parameter, nn.Parameter],
        ranks: Ranks | None,
    ) -> None:
        self._module, self._config = m, config
        loss_reduction, uses = self.loss_reduction, declared_uses(config)
        self._layers = layers = trainable_layers(m, uses, batch_first=self.batch_first)
        self._groups = tied_groups(layers)
        sizes = {name: group.size for name, group in self._groups.items()}
        joint = config.allocation == "joint"
        self._fractions = {} if joint else allocation.layer_fractions(sizes, config.allocation)
        self._guard = GradientGuard(m, layers.values(), whole, ranks)
        self._guard.joint = joint
        self._budget = Budget(config, layers.values(), self._guard)
        self._budget.gathered = Presence(m).of
        self._targets = {
            name: self._budget.target if joint else target_of(config) for name in layers
        }
        self._prober = Prober(
            m, loss_reduction=loss_reduction, layers=layers, ordered=joint, search=config.probe
        )
        self._trials = TrialsOfRanks(m, self._guard)
        try:
            self._max_grad_norm = max_grad_norm
        except ValueError:
            self._guard.remove()
            raise
        # Clips that the model brings along give way to ours, and stay where there are none.
        replaced = m if config.max_input_norm is not None else nn.Module()
        self._put_back_input_clips = remove_input_clips(replaced)
        enter, leave = self._enter_root, self._leave_root
        if self._budget.recurrent is not None:
            enter, leave = self._enter_root_eagerly, self._leave_root_eagerly
        self._handles = [
            # Ahead of FSDP's: ranks meet before they wait for each other's parameters.
            m.register_forward_pre_hook(enter, with_kwargs=True, prepend=bool(whole)),
            m.register_forward_hook(leave, with_kwargs=True, always_call=True),
        ]
        self._loss = None if criterion is None else criterion.watch
        self._guard.undoes_mean = mean = loss_reduction == "mean" and criterion is None
        if loss_reduction == "mean":
            self._guard.loss = self._loss
        settings = Settings(
            config,
            self._targets,
            {layer.name: group.name for group in self._groups.values() for layer in group.layers},
            self._guard,
            mean,
            SharedMeasurement(),
            self._budget,
            Followed(),
        )
        self._functions = Functions(layers, settings)
        for clip in layer_clips(layers.values(), settings):
            self._handles += clip.attach()
        for frozen in frozen_normalizations(m, {layer.module for layer in layers.values()}):
            self._handles += frozen.attach()
        for softmax in softmaxes(m):
            self._handles += softmax.attach()
        setattr(m, _ATTACHED, True)
        self._attached = True

    @property
    def _max_grad_norm(self) -> float:
        """Joint L2 sensitivity of the summed gradient; setting it moves every layer's.

        Raises:
            ValueError: set to anything but a finite number above zero.
            PrivacyViolationError: set while clipped gradients wait for their noise.
        """
        return self._norm

    @_max_grad_norm.setter
    def _max_grad_norm(self, value: float) -> None:
        if not is_positive_number(value):
            raise ValueError(f"Expected max_grad_norm={value!r} to be a finite number > 0.")
        if self._guard.pending:
            raise PrivacyViolationError(
                "max_grad_norm was set in the middle of a logical batch: gradients clipped to the "
                "old value would get the new value's noise. Set it between step() and backward()."
            )
        self._norm = value
        self._budget.target.limit.fill_(value)
        for name, sensitivity in self._layer_sensitivities.items():
            group = self._groups[name]
            limit = allocation.limit_of_each_use(sensitivity, group.uses)
            for layer in group.layers:
                self._targets[layer.name].limit.fill_(limit)

    @property
    def _layer_sensitivities(self) -> Mapping[str, float]:
        """Return Delta_l by module name; their squares sum to ``max_grad_norm ** 2``.

        Layers that share a parameter share one, under the first one's name. Empty with a joint
        budget, where every layer may use all of it.
        """
        return {name: part * self._norm for name, part in self._fractions.items()}

    def forbid_grad_accumulation(self) -> None:
        """Make a second backward pass before the optimizer's step an error."""
        self._guard.passes.accumulation_allowed = False

    def allow_grad_accumulation(self) -> None:
        """Let several backward passes over disjoint batches add up before one step."""
        self._guard.passes.accumulation_allowed = True

    def _sample_from(self, samples: SampleLog) -> None:
        """Train on nothing but the batches that a private loader draws."""
        samples.attached = True
        self._guard.passes.samples = samples

    def set_grad_sample_to_none(self) -> None:
        """Do nothing: no parameter has per-example gradients."""

    def del_grad_sample(self) -> None:
        """Do nothing: no parameter has per-example gradients."""

    def remove_hooks(self) -> None:
        """Take every hook away, input clipping included."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._guard.remove()
        if self._attached:
            delattr(self._module, _ATTACHED)
            self._attached = False

    def cleanup(self) -> None:
        """End private training; the model keeps its input clipping, which is a part of it.

        `unclip_inputs` takes that away, too.
        """
        attached = self._attached
        self.remove_hooks()
        for parameter in self._module.parameters():
            if hasattr(parameter, "summed_grad"):
                del parameter.summed_grad
        if attached and self._config.max_input_norm is not None:
            attach_input_clips(self._layers.values(), self._config.max_input_norm)

    def _undo(self) -> None:
        """Leave the model as it was before, with the input clipping it had."""
        self.remove_hooks()
        self._put_back_input_clips()

    def _enter_root(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        padded = self._guard.passes.samples.is_padded
        present = present_rows(args, kwargs, self._axis) if padded else None
        self._budget.present = present
        if torch.compiler.is_compiling():  # pragma: no cover (traced, unseen by coverage)
            if self._loss is not None:
                self._loss.enter_forward(None, present)
            self._budget.close_forward()
            note_form(self._budget.key, self._axis, m.training, args, kwargs)
            return
        self._guard.forms.at_hand = form_of(m.training, args, kwargs)
        size = self._batch_size(args, kwargs)
        batch = Batch(args, kwargs, size, self._axis, present=present)
        plan = self._trials.plan_of(batch, self._prober)
        self._guard.enter_forward(size, present)
        self._budget.open_forward()
        if self._loss is not None:
            self._loss.enter_forward(size, present)
        self._functions.begin(plan, batch.without_examples if plan.layers else ())

    def _leave_root(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not torch.is_grad_enabled():
            return
        self._functions.end()
        self._budget.close_forward()
        if torch.compiler.is_compiling():  # pragma: no cover (traced, unseen by coverage)
            return
        self._guard.leave_forward()
        self._guard.check_rounding(output)
        # Without an output an error is on its way already, and says more.
        if self._trials.untried and output is not None:
            self._guard.fail(self._trials.untried)
        if self._guard.ran_compiled:
            self._guard.forms.note_eager(Batch(args, kwargs, self._guard.examples, self._axis))

    # A compiler leaves recurrent networks to eager mode, whose checks need the forward pass.

    @torch.compiler.disable(reason=RECURRENT_IS_EAGER)
    def _enter_root_eagerly(self, *arguments: Any) -> None:
        self._enter_root(*arguments)

    @torch.compiler.disable(reason=RECURRENT_IS_EAGER)
    def _leave_root_eagerly(self, *arguments: Any) -> None:
        self._leave_root(*arguments)

    @property
    def _axis(self) -> int:
        return 0 if self.batch_first else 1

    def _batch_size(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        size = batch_size(args, kwargs, self._axis)
        if size is not None:
            return size
        raise CoverageError(
            "The model's inputs hold no tensor with a batch axis, so the number of examples is "
            f"unknown. Pass the batch as a tensor, batch {('first', 'second')[self._axis]}."
        )
