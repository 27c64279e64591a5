"""The callback that ends a run of Hugging Face's trainer where its epsilon ends."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class StopAtTarget(TrainerCallback):
    """Stops a trainer before the step that would spend more than the target.

    Args:
        trainer: a `PrivateTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def _next_steps(self) -> tuple[float, float, int]:
        private = self.trainer._private
        assert private is not None
        rate = private.optimizer.step_hook.sample_rate
        return private.optimizer.noise_multiplier, rate, private.steps

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        """Raise if no step is left."""
        self.trainer._spending.require_left(*self._next_steps())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop after the last step that fits the target."""
        if self.trainer._spending.is_spent(*self._next_steps()):
            control.should_training_stop = True
