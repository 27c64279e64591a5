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

    A step moves ``p.grad`` into ``p.summed_grad``, adds Gaussian noise of standard deviation
    ``noise_multiplier * max_grad_norm`` to the sum of a whole logical batch, divides by the
    expected batch size where the loss is a mean, and steps the wrapped optimizer. A parameter
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
            PrivacyViolationError: set while clipped gradients wait for their noise.
        """
        return self._hooks.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        if self._hooks.guard.passes or any(
            getattr(p, "summed_grad", None) is not None and not hasattr(p.summed_grad, "_processed")
            for p in self.params
        ):
            raise PrivacyViolationError(
                "max_grad_norm was set in the middle of a logical batch: gradients clipped to the "
                "old value would get the new value's noise. Set it between step() and backward()."
            )
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
        """Move each parameter's clipped sum from ``p.grad`` into ``p.summed_grad``.

        Raises:
            PrivacyViolationError: a gradient was not covered, or was changed since the backward
                pass. Nothing is released; `zero_grad` clears the state.
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
            if p.summed_grad is None:
                p.summed_grad = torch.zeros_like(p) if gradient is None else gradient
            elif gradient is not None:
                p.summed_grad += gradient
        guard.clear()

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Collect, and at the end of a logical batch add noise, divide and account.

        Returns:
            Whether the wrapped optimizer is to step.
        """
        self.accumulate()
        if self._check_skip_next_step():
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
        super().zero_grad(set_to_none)
        self._hooks.guard.clear()
