"""`BackpropClipHooks`, which attach backpropagation clipping to a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from opacus.grad_sample import AbstractGradSampleHooks
from torch import nn

from opacus_bpclip.clipping.attach import frozen_normalizations, layer_clips, softmaxes
from opacus_bpclip.clipping.base import Settings
from opacus_bpclip.clipping.budget import Budget
from opacus_bpclip.clipping.functions import Functions
from opacus_bpclip.clipping.recurrent import RECURRENT_IS_EAGER
from opacus_bpclip.clipping.sensitivities import Sensitivities
from opacus_bpclip.clipping.shared import SharedMeasurement
from opacus_bpclip.clipping.traced_form import note_form, traced_rows
from opacus_bpclip.clipping.whitening import Whitening
from opacus_bpclip.config import BackpropClipping, is_positive_number
from opacus_bpclip.errors import CoverageError, PrivacyViolationError
from opacus_bpclip.guard.forms import form_of
from opacus_bpclip.guard.guard import GradientGuard
from opacus_bpclip.guard.precision import rounded_option, rounded_options
from opacus_bpclip.guard.ranks import Ranks
from opacus_bpclip.guard.statistics import watch_statistics
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
    """Hooks that turn a model's gradients into sums of bounded contributions, one per example.

    Guarantee: after a backward pass, the gradient of all trainable parameters together is a sum
    over the examples of the batch. Each term depends on its example and the parameters alone. Its
    norm is at most ``max_grad_norm``; with layerwise budgets, its part in layer ``l`` has norm at
    most ``layer_sensitivities[l]``.

    Args:
        m: the model; hooks are added to its modules, which are not replaced.
        config: the options of the clipping; the defaults if ``None``.
        max_grad_norm: the L2 sensitivity of the summed gradient.
        loss_reduction: ``"mean"`` or ``"sum"``, how the loss reduces over the batch.
        batch_first: whether the batch is the first axis of all inputs; otherwise the second.
        criterion: the private criterion, if every loss is computed by one. Its gradients are those
            of a sum, whatever ``loss_reduction`` is.
        ranks: the ranks that train the model together; all of them must call this.

    Raises:
        CoverageError: no rule bounds some trainable parameter, or the model has hooks already. The
            model is left unchanged.
        ValueError: an option needs more of the gradients than a plain mean loss in single precision
            leaves, or the model fails on the public examples of `InputWhitening`.
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
        # Opacus's own __init__ is not called: it gives every parameter a grad_sample.
        if hasattr(m, _ATTACHED):
            raise CoverageError(
                "The model has backpropagation clipping attached already. Call cleanup() on the "
                "model that make_private returned, or pass a fresh one. For several optimizers of "
                "one model, pass opacus_bpclip.SeveralOptimizers(one, other) in one call."
            )
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f'Expected loss_reduction={loss_reduction!r} to be "mean" or "sum".')
        self.batch_first, self.loss_reduction = batch_first, loss_reduction
        config = config or BackpropClipping()
        plain_mean = loss_reduction == "mean" and criterion is None
        if plain_mean and (problem := rounded_options(config, m.parameters())):
            raise ValueError(problem)
        whole = whole_parameters(m)
        with gathered(m):
            self._attach(m, config, max_grad_norm, criterion, whole, ranks)

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
        self._sensitivities = Sensitivities(config, self._groups)
        self._guard = GradientGuard(m, layers.values(), whole, ranks)
        self._guard.joint = joint = config.allocation == "joint"
        self._guard.parameters.watch_counts(self._sensitivities.counts)
        targets = self._sensitivities.targets
        self._budget = Budget(config, layers.values(), self._guard, targets)
        self._budget.gathered = Presence(m).of
        self._prober = Prober(
            m, loss_reduction=loss_reduction, layers=layers, ordered=joint, search=config.probe
        )
        self._trials = TrialsOfRanks(m, self._guard)
        try:
            self._max_grad_norm = max_grad_norm
        except ValueError:
            self._guard.remove()
            raise
        # With max_input_norm, the layers' clips replace those of an earlier `clip_inputs`.
        replaced = m if config.max_input_norm is not None else nn.Module()
        self._put_back_input_clips = remove_input_clips(replaced)
        enter, leave = self._enter_root, self._leave_root
        if self._budget.recurrent is not None:
            enter, leave = self._enter_root_eagerly, self._leave_root_eagerly
        self._handles = [
            # Before FSDP's hooks, so that a refusal on one rank does not leave the others waiting.
            m.register_forward_pre_hook(enter, with_kwargs=True, prepend=bool(whole)),
            m.register_forward_hook(leave, with_kwargs=True, always_call=True),
        ]
        self._loss = None if criterion is None else criterion.watch
        self._guard.undoes_mean = mean = loss_reduction == "mean" and criterion is None
        self._guard.roundings.option = rounded_option(config) if mean else None
        if loss_reduction == "mean":
            self._guard.loss = self._loss
        self._whitening = Whitening(m, config, self._groups)
        settings = Settings(
            config,
            targets,
            {layer.name: name for name, group in self._groups.items() for layer in group.layers},
            self._guard,
            mean,
            SharedMeasurement(),
            self._budget,
            Followed(),
            self._whitening,
        )
        self._functions = Functions(layers, settings)
        for clip in layer_clips(layers.values(), settings):
            self._handles += clip.attach()
        for frozen in frozen_normalizations(m, {layer.module for layer in layers.values()}):
            self._handles += frozen.attach()
        for softmax in softmaxes(m):
            self._handles += softmax.attach()
        self._handles += watch_statistics(m)
        setattr(m, _ATTACHED, True)
        self._attached = True
        self._whitening.begin(self._undo)

    @property
    def _max_grad_norm(self) -> float:
        """The L2 sensitivity of the summed gradient; setting it rescales every layer's.

        Raises:
            ValueError: the new value is not a finite number above zero.
            PrivacyViolationError: there are clipped gradients that have no noise yet.
        """
        return self._sensitivities.max_grad_norm

    @_max_grad_norm.setter
    def _max_grad_norm(self, value: float) -> None:
        if not is_positive_number(value):
            raise ValueError(f"Expected max_grad_norm={value!r} to be a finite number > 0.")
        if self._guard.pending:
            raise PrivacyViolationError(
                "max_grad_norm was set in the middle of a logical batch. Gradients clipped to the "
                "old value would get the new value's noise. Set it between step() and backward()."
            )
        self._sensitivities.set(value)

    @property
    def _layer_sensitivities(self) -> Mapping[str, float]:
        """Return ``Delta_l`` by module name; their squares sum to ``max_grad_norm ** 2``.

        Layers that share a parameter have one ``Delta_l``, under the name of the first. Empty with
        a joint budget.
        """
        return self._sensitivities.by_layer

    def forbid_grad_accumulation(self) -> None:
        """Refuse a second backward pass before the optimizer's step."""
        self._guard.passes.accumulation_allowed = False

    def allow_grad_accumulation(self) -> None:
        """Allow several backward passes, over different physical batches, before one step."""
        self._guard.passes.accumulation_allowed = True

    def _sample_from(self, samples: SampleLog) -> None:
        """Accept only batches that the private loader has drawn."""
        samples.attached = True
        self._guard.passes.samples = samples

    def set_grad_sample_to_none(self) -> None:
        """Do nothing: no parameter has per-example gradients."""

    del_grad_sample = set_grad_sample_to_none

    def remove_hooks(self) -> None:
        """Remove all hooks, those of input clipping included."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._guard.remove()
        if self._attached:
            delattr(self._module, _ATTACHED)
            self._attached = False

    def cleanup(self) -> None:
        """End private training. Input clipping, which is a part of the model, stays.

        `unclip_inputs` removes it, too.
        """
        attached = self._attached
        self.remove_hooks()
        for parameter in self._module.parameters():
            if hasattr(parameter, "summed_grad"):
                del parameter.summed_grad
        if attached and self._config.max_input_norm is not None:
            attach_input_clips(self._layers.values(), self._config.max_input_norm)

    def _undo(self) -> None:
        """Remove all hooks, and restore the input clipping that the model had before."""
        self.remove_hooks()
        self._put_back_input_clips()

    def _enter_root(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        padded = self._guard.passes.samples.is_padded
        self._budget.present = present = present_rows(args, kwargs, self._axis) if padded else None
        if torch.compiler.is_compiling():  # pragma: no cover (traced, unseen by coverage)
            if self._loss is not None:
                self._loss.enter_forward(None, present)
            self._budget.close_forward()
            note_form(self._budget.key, self._axis, m.training, args, kwargs)
            self._budget.forwards.trace(traced_rows(args, kwargs, self._axis, present))
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
        # Without an output the forward pass has raised an error already, which says more.
        if self._trials.untried and output is not None:
            self._guard.fail(self._trials.untried)
        if self._guard.ran_compiled:
            self._guard.forms.note_eager(Batch(args, kwargs, self._guard.examples, self._axis))

    # Recurrent networks run in eager mode under torch.compile, so these hooks must, too.
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
        size, place = batch_size(args, kwargs, self._axis), ("first", "second")[self._axis]
        if size is None:
            raise CoverageError(
                "The model's inputs contain no tensor with a batch axis, so the number of examples "
                f"is unknown. Pass the batch as a tensor whose {place} axis is the batch."
            )
        return size
