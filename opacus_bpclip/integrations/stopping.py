"""The callback that ends a run of Hugging Face's trainer where its epsilon ends."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

_logger = logging.get_logger(__name__)


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

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise if no step is left."""
        self.require_left()

    def require_left(self) -> None:
        """Raise if one more step would spend more than the target."""
        self.trainer._spending.require_left(*self._next_steps())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop after the last step that fits the target: say so, evaluate, and save."""
        if not self.trainer._spending.is_spent(*self._next_steps()):
            return
        control.should_training_stop = True
        if state.global_step < state.max_steps:
            control.should_save |= args.save_strategy != "no"
            control.should_evaluate |= args.eval_strategy != "no"
            _logger.warning(
                "Training stops at step %d of %d: it has spent an epsilon of %.4g, and one more "
                "step would exceed target_epsilon=%s.",
                state.global_step,
                state.max_steps,
                self.trainer.epsilon,
                self.trainer.privacy.target_epsilon,
            )
