"""What an optimizer that wraps another one owes to code around it: copies, checkpoints, signals."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from typing_extensions import Self

from opacus_bpclip.guard.guard import GradientGuard
from opacus_bpclip.hooks import BackpropClipHooks
from opacus_bpclip.optimizer import fingerprint


class OptimizerWrapper(DPOptimizerFastGradientClipping):
    """Opacus's optimizer for gradients that arrive summed, without the step."""

    _hooks: BackpropClipHooks

    @property
    def _guard(self) -> GradientGuard:
        return self._hooks._guard

    # What a step leaves for the next call is kept beside the gradients, not in this object: a
    # wrapper (Lightning's) may have taken a copy of its attributes.

    @property
    def _is_last_step_skipped(self) -> bool:
        return self._guard.passes.samples.last_step_skipped

    @_is_last_step_skipped.setter
    def _is_last_step_skipped(self, value: bool) -> None:
        self._guard.passes.samples.last_step_skipped = value

    # GradScaler hands its scale to an optimizer with this flag, instead of touching gradients.
    _step_supports_amp_scaling = True

    @property
    def grad_scale(self) -> float:
        """Return 1: no gradient is scaled."""
        return 1.0

    @grad_scale.setter
    def grad_scale(self, value: object) -> None:
        raise ValueError(
            "GradScaler multiplies the loss by a number that depends on the data (it shrinks where "
            "gradients overflow), so clipped gradients and the noise would be scaled apart. Train "
            "in bfloat16 or float32 without GradScaler; GradScaler(enabled=False) does nothing and "
            "may stay."
        )

    @grad_scale.deleter
    def grad_scale(self) -> None:
        pass

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Announce the next physical batch, as `BatchMemoryManager` does for each.

        Args:
            do_skip: whether its logical batch, the sample that was drawn last, has more parts.
        """
        self._guard.passes.samples.signal(do_skip)

    def _check_skip_next_step(self, pop_next: bool = True) -> bool:
        return self._guard.passes.skips(pop=pop_next)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state, and the settings that privacy was spent under."""
        return {**self.original_optimizer.state_dict(), fingerprint.KEY: self._settings()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the wrapped optimizer's state; warn if it was saved under other settings."""
        state = dict(state_dict)
        fingerprint.compare(state.pop(fingerprint.KEY, None), self._settings())
        self.original_optimizer.load_state_dict(state)

    def _settings(self) -> fingerprint.Settings:
        return fingerprint.settings_of(
            self._hooks._config,
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=self.max_grad_norm,
            sample_rate=getattr(self.step_hook, "sample_rate", None),
            expected_batch_size=self._expected_of_all(),
            loss_reduction=self.loss_reduction,
        )

    def _expected_of_all(self) -> float | None:
        """Return the expected batch size of all ranks together."""
        own: float | None = self.expected_batch_size
        return own if own is None else own * self._guard.ranks.size

    def __getstate__(self) -> dict[str, Any]:
        """Return all of it, but for a ``step`` that a scheduler has put in the method's place."""
        # Not torch's own, which knows of no wrapper.
        return {name: value for name, value in vars(self).items() if name != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for p in self.params:
            # A parameter's copy has no attributes.
            p.summed_grad = getattr(p, "summed_grad", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy that draws from the same generator.

        With a generator in the same state it would draw the same noise, which cancels in the
        difference of two releases.
        """
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        memo[id(self.generator)] = self.generator
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        for p, own in zip(self.params, copied.params, strict=True):
            own.summed_grad = copy.deepcopy(p.summed_grad, memo)
        return copied
