"""The optimizer: collect clipped sums, add noise once, divide by a public constant, step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch.optim import Optimizer

from opacus_bpclip.errors import PrivacyViolationError
from opacus_bpclip.guard.gradient_checks import mark_as_cleared
from opacus_bpclip.guard.precision import rounded_sums
from opacus_bpclip.guard.ranks import Place
from opacus_bpclip.guard.rehearsal import check_graphs
from opacus_bpclip.hooks import BackpropClipHooks
from opacus_bpclip.optimizer.marks import is_released, mark_as_released
from opacus_bpclip.optimizer.noise import add_noise_
from opacus_bpclip.optimizer.ranks import released
from opacus_bpclip.optimizer.scales import noise_of
from opacus_bpclip.optimizer.wrapper import OptimizerWrapper
from opacus_bpclip.rules.precision import norm_dtype


class BackpropClipOptimizer(OptimizerWrapper):
    """Opacus's optimizer for gradients that arrive clipped and summed.

    A step takes the sum of contributions into ``p.summed_grad``, adds Gaussian noise of standard
    deviation ``noise_multiplier * max_grad_norm`` to the sum of a whole logical batch, divides by
    the expected batch size where the loss is a mean, and steps the wrapped optimizer. Sum and noise
    are in float32 where the parameter is in lower precision. A parameter
    without a gradient (an empty batch, an unused layer) gets the noise alone.

    Guarantee: one step is one Gaussian mechanism of sensitivity ``max_grad_norm`` and one entry in
    the accountant, whatever the number of layers or of physical batches.

    Args:
        optimizer: wrapped optimizer.
        hooks: the hooks that clip the model's gradients.
        noise_multiplier: noise standard deviation over ``max_grad_norm``.
        max_grad_norm: joint L2 sensitivity of the summed gradient.
        expected_batch_size: expected batch size of each rank, the public divisor for
            ``loss_reduction="mean"``.
        loss_reduction: ``"mean"`` or ``"sum"``, the same as the hooks'.
        **options: further arguments of Opacus's ``DPOptimizer``.

    Attributes:
        keep_summed_grad: whether ``p.summed_grad``, the sum without noise, outlives the step, for
            tests and audits; with several ranks, this rank's own. By default the noise is added
            to it in place: nothing without noise is left, and the parameters' gradients are in
            memory once.

    Raises:
        ValueError: ``max_grad_norm`` is not positive, ``loss_reduction`` is not the hooks', or
            ``expected_batch_size`` is missing where a threshold follows a quantile.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        hooks: BackpropClipHooks,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: int | None,
        loss_reduction: str = "mean",
        **options: Any,
    ) -> None:
        if loss_reduction != hooks.loss_reduction:
            raise ValueError(
                f"Expected loss_reduction={loss_reduction!r} to be the model's, "
                f"{hooks.loss_reduction!r}."
            )
        if expected_batch_size is None and hooks._sensitivities.counts:
            raise ValueError(
                "An AdaptiveThreshold needs expected_batch_size, a public number: it follows the "
                "fraction of examples within it."
            )
        self._hooks = hooks  # before Opacus's __init__, which sets attributes that are kept there
        self.keep_summed_grad = False
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction=loss_reduction,
            **options,
        )
        self._drop_sums()

    @property
    def accumulated_iterations(self) -> int:
        """Return how many logical batches the step's gradient adds up.

        Always 1 under Poisson sampling: physical batches are parts of one logical batch.
        """
        return self._guard.collected or self._guard.accumulated

    def accumulate(self) -> None:
        """Add each parameter's sum of contributions to ``p.summed_grad``.

        Raises:
            PrivacyViolationError: the gradients are not covered by the guarantee. Nothing is
                released; `zero_grad` clears the state.
            ValueError: `zero_grad` was not called since the last step.
        """
        guard = self._guard
        if (given_up := guard.ranks.given_up) is not None:
            raise PrivacyViolationError(f"The ranks have given up this batch: {given_up}")
        if guard.violation is not None:
            raise PrivacyViolationError(
                f"These gradients are not covered by the guarantee: {guard.violation}"
            )
        check_graphs(self._hooks._module, guard)
        if any(is_released(p.grad) for p in self.params):
            raise ValueError(
                "Gradients haven't been cleared since the last optimizer step. To obtain privacy "
                "guarantees you must call optimizer.zero_grad() on each step."
            )
        for p in self.params:
            if p not in guard.parameters:
                raise PrivacyViolationError(
                    f"The optimizer holds a parameter of shape {tuple(p.shape)} that was not a "
                    "trainable parameter of the model when make_private was called, so its "
                    "gradient is not clipped. Add it to the model and the optimizer first, then "
                    "call make_private."
                )
        if guard.undoes_mean:
            rows = guard.passes.rows
            guard.require(rounded_sums(rows, self.expected_batch_size, self.params))
        guard.require(guard.passes.collect(any_gradient=guard.collected > 0))
        for p in self._summed:
            gradient = guard.take(p)
            if hasattr(p.summed_grad, "_processed"):  # Kept for tests; it has had its noise.
                p.summed_grad = None
            if gradient is not None:
                # Out of place: autograd may have sent one tensor to two parameters.
                p.summed_grad = gradient if p.summed_grad is None else p.summed_grad + gradient
            elif p.summed_grad is None:
                whole = guard.parameters.whole(p)
                p.summed_grad = torch.zeros_like(whole, dtype=norm_dtype(whole.dtype))

    def add_noise(self) -> None:
        """Set each ``p.grad`` to ``p.summed_grad`` plus Gaussian noise, independent in each entry.

        The noise's standard deviation is ``noise_multiplier * max_grad_norm``, or what `noise_of`
        divides over layers and counts. It is computed only here. With several ranks, ``p.grad`` is
        the sum over all ranks, with noise drawn once.
        """
        self._begin_drawing()
        held = self._summed
        sums = [p.summed_grad for p in held]
        for summed in sums:
            _check_processed_flag(summed)
        if self.keep_summed_grad:
            sums = [summed.clone() for summed in sums]
        noise = noise_of(self._hooks._sensitivities, self.noise_multiplier, self.max_grad_norm)
        stds = [noise[self._guard.parameters.whole(p)] for p in held]
        add_noise = partial(add_noise_, generator=self.generator, secure_mode=self.secure_mode)
        noised = released(sums, held, self._guard.ranks, add_noise, stds)
        self._hooks._sensitivities.note(noised[len(self.params) :])
        for p, gradient in zip(self.params, noised, strict=False):
            # After the noise, rounding to the parameter's dtype is post-processing.
            p.grad = gradient.to(p.dtype)
        self._drop_sums(kept=held if self.keep_summed_grad else ())
        for p in held if self.keep_summed_grad else ():
            _mark_as_processed(p.summed_grad)

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Collect, and at the end of a logical batch add noise, divide and account.

        If the step hook raises, the gradient is gone, and the next batch begins as usual.

        Returns:
            Whether the wrapped optimizer is to step.
        """
        skip = self._check_skip_next_step()
        try:
            self._collect(skip)
        except PrivacyViolationError:
            self._end_refused_batch(skip)
            raise
        # A gradient that is here has no noise: the wrapped optimizer must not use it.
        self._drop_gradients()
        if skip:
            self._is_last_step_skipped = True
            self._guard.finish()
            return False
        try:
            with self._guard.ranks.agreed():
                self._release()
        except BaseException:
            # What the accountant may not have counted is not released.
            self._drop_gradients()
            self._drop_sums()
            raise
        finally:
            self._is_last_step_skipped = False
            self._guard.finish()
            self._guard.passes.samples.close()
        return True

    def _release(self) -> None:
        self.add_noise()
        self.scale_grad()
        for p in self.params:
            mark_as_released(p.grad)
        if self.step_hook:
            self.step_hook(self)
        self._hooks._sensitivities.follow(self._expected_examples)

    def _collect(self, skip: bool) -> None:
        """Accumulate; at the end of a logical batch, go on only if all ranks do."""
        ranks = self._guard.ranks
        ranks.in_pass = False
        refusal: Exception | None = None
        problem = None
        try:
            self.accumulate()
        except (PrivacyViolationError, ValueError) as error:
            refusal = error
        if not skip and ranks.given_up is None:
            problem = self._meet(None if refusal is None else str(refusal))
        elif refusal is not None:
            ranks.refuse(str(refusal))
        try:
            if refusal is not None:
                raise refusal
            self._guard.require(problem)
        finally:
            if not skip:
                ranks.begin_batch()

    def _meet(self, refusal: str | None) -> str | None:
        """Wait for all ranks at the end of a logical batch; return why no rank may step.

        With sharded parameters, this rank meanwhile takes part in the passes of ranks that have
        more physical batches.
        """
        ranks, numbers = self._guard.ranks, (self.noise_multiplier, self.max_grad_norm)
        batches, thresholds = self.accumulated_iterations, self._hooks._sensitivities.checksum
        refusal = refusal or self._hooks._trials.nothing_passed
        while True:
            problem = ranks.meet(Place.STEP, (*numbers, batches, thresholds), refusal=refusal)
            if problem is not None or not ranks.waits:
                return problem
            self._hooks._trials.pass_without_examples()
            self._guard.accumulated = batches

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one private step.

        Args:
            closure: evaluates the model, calls ``backward`` and returns the loss; run once.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.pre_step():
            with self._guard.ranks.agreed():
                self.original_optimizer.step()
                self._hooks._whitening.follow()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard the gradients since the last step; keep the sums of earlier physical batches.

        After the step of a logical batch, ``p.summed_grad`` is set to ``None``, too.

        Args:
            set_to_none: set ``p.grad`` to ``None`` instead of zero, as torch does by default.
        """
        if self._guard.violation is not None and not self._guard.refused:
            self._end_refused_batch(self._check_skip_next_step())
        super().zero_grad(set_to_none)
        if not self._is_last_step_skipped:
            self._drop_sums()
        for p in self.params:
            if p.grad is not None:
                mark_as_cleared(p.grad)
        self._guard.clear()

    def _end_refused_batch(self, skip: bool) -> None:
        # Every physical batch has one signal, which is taken here as step() would have taken it.
        # If the refused batch ended a logical batch, or its rows are of another sample, the sums
        # collected so far must not be added to the next logical batch.
        samples = self._guard.passes.samples
        self._guard.refused = True
        if not skip:
            self._guard.ranks.begin_batch()
        if not skip or samples.mixed:
            self._drop_sums()
            self._is_last_step_skipped = False
            samples.close()
