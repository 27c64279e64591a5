"""The optimizer: collect clipped sums, add noise once, divide by a public constant, step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from opacus.optimizers.optimizer import _check_processed_flag
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from torch.optim import Optimizer

from opacus_bpclip.errors import PrivacyViolationError
from opacus_bpclip.grad_sample_module import BackpropClipHooks


class BackpropClipOptimizer(DPOptimizerFastGradientClipping):
    """Opacus's optimizer for gradients that arrive clipped and summed.

    A step takes the sum of contributions into ``p.summed_grad``, adds Gaussian noise of standard
    deviation ``noise_multiplier * max_grad_norm`` to the sum of a whole logical batch, divides by
    the expected batch size where the loss is a mean, and steps the wrapped optimizer. A parameter
    without a gradient (an empty batch, an unused layer) gets the noise alone.

    Guarantee: one step is one Gaussian mechanism of sensitivity ``max_grad_norm`` and one entry in
    the accountant, whatever the number of layers or of physical batches.

    Args:
        optimizer: wrapped optimizer.
        hooks: what clips the model's gradients.
        noise_multiplier: noise standard deviation over ``max_grad_norm``.
        max_grad_norm: joint L2 sensitivity of the summed gradient.
        expected_batch_size: the public divisor for ``loss_reduction="mean"``.
        loss_reduction: ``"mean"`` or ``"sum"``; must be the hooks' own.
        **options: as for Opacus's ``DPOptimizer``.

    Raises:
        ValueError: ``max_grad_norm`` is not positive, or ``loss_reduction`` is not the hooks' own.
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
        self._hooks = hooks
        self._passes = 1
        self._refused = False
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction=loss_reduction,
            **options,
        )

    @property
    def max_grad_norm(self) -> float:
        """Joint L2 sensitivity of the summed gradient; setting it moves every layer's.

        Raises:
            ValueError: set to anything but a finite number above zero.
            PrivacyViolationError: set while clipped gradients wait for their noise.
        """
        return self._hooks.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self._hooks.max_grad_norm = value

    @property
    def layer_sensitivities(self) -> Mapping[str, float]:
        """Return Delta_l by module name; their squares sum to ``max_grad_norm ** 2``."""
        return self._hooks.layer_sensitivities

    @property
    def accumulated_iterations(self) -> int:
        """Return how many batches the step's gradient adds up.

        Always 1 under Poisson sampling. `BatchMemoryManager`'s physical batches are one batch.
        """
        return self._passes

    def accumulate(self) -> None:
        """Add each parameter's sum of contributions to ``p.summed_grad``.

        Raises:
            PrivacyViolationError: the gradients are not covered by the guarantee. Nothing is
                released; `zero_grad` clears the state.
            ValueError: `zero_grad` was not called since the last step.
        """
        guard = self._hooks.guard
        if guard.violation is not None:
            raise PrivacyViolationError(
                f"These gradients are not covered by the guarantee: {guard.violation}"
            )
        for p in self.params:
            if p.summed_grad is not None:
                _check_processed_flag(p.summed_grad)
        self._passes = max(1, guard.passes)
        for p in self.params:
            gradient = guard.take(p)
            if gradient is not None:
                # Out of place: autograd may have sent one tensor to two parameters.
                p.summed_grad = gradient if p.summed_grad is None else p.summed_grad + gradient
            elif p.summed_grad is None:
                p.summed_grad = torch.zeros_like(p)
        guard.finish()

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Collect, and at the end of a logical batch add noise, divide and account.

        Returns:
            Whether the wrapped optimizer is to step.
        """
        skip = self._check_skip_next_step()
        try:
            self.accumulate()
        except PrivacyViolationError:
            self._end_refused_batch(skip)
            raise
        for group in self.param_groups:
            for p in group["params"]:
                # Whatever is there has no noise: the wrapped optimizer must not see it.
                p.grad = None
        if skip:
            self._is_last_step_skipped = True
            return False
        self.add_noise()
        self.scale_grad()
        if self.step_hook:
            self.step_hook(self)
        self._is_last_step_skipped = False
        return True

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
            self.original_optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Throw the gradients at hand away; physical batches collected so far stay.

        Args:
            set_to_none: set ``p.grad`` to ``None`` instead of zero; ``p.summed_grad`` always is.
        """
        if self._hooks.guard.violation is not None and not self._refused:
            self._end_refused_batch(self._check_skip_next_step())
        self._refused = False
        super().zero_grad(set_to_none)
        self._hooks.guard.clear()

    def _end_refused_batch(self, skip: bool) -> None:
        # Every physical batch brings one signal, taken here as step() would have. If it ended a
        # logical batch, what that has collected must not be added to the next one's.
        self._refused = True
        if not skip:
            for p in self.params:
                p.summed_grad = None
            self._is_last_step_skipped = False
