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

    def _is_spent(self) -> bool:
        private = self.trainer._private
        assert private is not None
        rate = private.optimizer.step_hook.sample_rate
        return self.trainer._spending.is_spent(
            private.optimizer.noise_multiplier, rate, private.steps
        )

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        """Raise if no step is left."""
        if self._is_spent():
            spent, target = self.trainer.epsilon, self.trainer.privacy.target_epsilon
            raise ValueError(
                f"The run has spent an epsilon of {spent:.4g}, and one more step would exceed "
                f"target_epsilon={target}. Pass a larger target_epsilon, or a larger "
                "noise_multiplier, with which more steps fit."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop after the last step that fits the target."""
        if self._is_spent():
            control.should_training_stop = True
