"""The private optimizer without its step: copies, checkpoints, and signals of physical batches."""

from __future__ import annotations

import copy
import math
import uuid
from collections.abc import Collection, Mapping
from typing import Any

import torch
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from typing_extensions import Self

from opacus_bpclip.errors import PrivacyViolationError
from opacus_bpclip.guard.generators import apart, renewed
from opacus_bpclip.guard.guard import GradientGuard
from opacus_bpclip.guard.seeds import Purpose
from opacus_bpclip.hooks import BackpropClipHooks
from opacus_bpclip.optimizer import fingerprint
from opacus_bpclip.optimizer.accounting import AccountStep, Hook
from opacus_bpclip.optimizer.ranks import local
from opacus_bpclip.sampling.sampler import CountedSampler

_THRESHOLDS = "thresholds"
_PLACE = "noise_place"


class OptimizerWrapper(DPOptimizerFastGradientClipping):
    """Opacus's optimizer for gradients that arrive summed; subclasses add the step."""

    generator: torch.Generator | None
    _hooks: BackpropClipHooks
    step_hook: Hook | None
    # The sampler of the private loader; ``None`` without Poisson sampling.
    _sampler: CountedSampler | None = None
    # Names the place in the stream of noise where a state was saved, until noise is drawn there.
    _place: str | None = None

    @property
    def _guard(self) -> GradientGuard:
        return self._hooks._guard

    @property
    def _device(self) -> torch.device:
        """Return the device of the parameters that train, or have trained."""
        return self._guard.parameters.device or torch.device("cpu")

    @property
    def noise_multiplier(self) -> float:
        """The noise's standard deviation over ``max_grad_norm``.

        Raises:
            ValueError: set to anything but a finite number, zero or above.
        """
        return self._noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        # A tensor that is changed later would change what the accountant has counted.
        number = float(value)
        if not 0 <= number < math.inf:
            raise ValueError(f"Expected noise_multiplier={value!r} to be a finite number >= 0.")
        self._noise_multiplier = number

    @property
    def max_grad_norm(self) -> float:
        """Joint L2 sensitivity of the summed gradient; setting it rescales every layer's.

        Raises:
            ValueError: set to anything but a finite number above zero.
            PrivacyViolationError: set while clipped gradients wait for their noise.
        """
        return self._hooks._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self._hooks._max_grad_norm = value

    @property
    def layer_sensitivities(self) -> Mapping[str, float]:
        """Return Delta_l by module name; their squares sum to ``max_grad_norm ** 2``."""
        return self._hooks._layer_sensitivities

    @property
    def thresholds(self) -> Mapping[str, float]:
        """Return the norms from which on an example's gradient is scaled down, by module name.

        With a joint budget there is one, under the name ``"(model)"``.
        """
        return self._hooks._sensitivities.thresholds

    @property
    def _summed(self) -> list[Any]:
        """Return all that a step releases: the parameters, and the counts of examples."""
        return [*self.params, *self._hooks._sensitivities.counts.values()]

    def _drop_gradients(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def _drop_sums(self, kept: Collection[Any] = ()) -> None:
        """Discard all sums but some, also those of parameters that were frozen since they began.

        What a later step would find of them is of another sample, and has no noise.
        """
        kept = set(kept)
        for held in {*self._guard.parameters.held, *self._summed} - kept:
            held.summed_grad = None

    @property
    def _expected_examples(self) -> float:
        """Return the expected number of examples in a step, of all ranks together; 0 if unknown."""
        own: float = (self.expected_batch_size or 0) * self.accumulated_iterations
        return own * self._guard.ranks.size

    def scale_grad(self) -> None:
        """Divide ``p.grad`` by the expected batch size, where the loss is a mean."""
        if self.loss_reduction == "mean":
            divisor = self._expected_examples
            torch._foreach_div_([local(p.grad) for p in self.params], divisor)

    # This flag is kept in the guard and not in the optimizer, since a wrapper (Lightning's) may
    # have copied the optimizer's attributes.

    @property
    def _is_last_step_skipped(self) -> bool:
        return self._guard.passes.samples.last_step_skipped

    @_is_last_step_skipped.setter
    def _is_last_step_skipped(self, value: bool) -> None:
        self._guard.passes.samples.last_step_skipped = value

    # With this flag GradScaler sets `grad_scale` on the optimizer and does not change gradients.
    _step_supports_amp_scaling = True

    @property
    def grad_scale(self) -> float:
        """Return 1.0: gradients are never scaled. Setting it is refused."""
        return 1.0

    @grad_scale.setter
    def grad_scale(self, value: object) -> None:
        raise ValueError(
            "GradScaler multiplies the loss by a number that depends on the data (it shrinks where "
            "gradients overflow), so the clipped gradients would have another scale than the "
            "noise. Train in bfloat16 or float32 without GradScaler; GradScaler(enabled=False) "
            "does nothing and may stay."
        )

    @grad_scale.deleter
    def grad_scale(self) -> None:
        pass

    def attach_step_hook(self, fn: Hook | None) -> None:
        """Call a function in each step, before the wrapped optimizer's; it replaces an earlier one.

        The accountant counts the step first, unless ``None`` or its own hook has replaced that.

        Args:
            fn: called with the optimizer. ``None`` leaves nothing: no step is counted then.

        Raises:
            PrivacyViolationError: it is the hook of an accountant that has replaced the engine's
                after steps which that one has counted.
        """
        counts = self.step_hook
        if fn is None:
            self.step_hook = None
        elif isinstance(counts, AccountStep):
            self.step_hook = counts.with_hook(fn)
        else:
            self.step_hook = AccountStep.of(fn) or fn

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Announce the next physical batch; `BatchMemoryManager` calls this for each.

        Args:
            do_skip: whether more physical batches of its logical batch follow.
        """
        self._guard.passes.samples.signal(do_skip)

    def _check_skip_next_step(self, pop_next: bool = True) -> bool:
        return self._guard.passes.skips(pop=pop_next)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state and the privacy settings."""
        self._place = self._place or uuid.uuid4().hex
        state = {
            **self.original_optimizer.state_dict(),
            fingerprint.KEY: self._settings(),
            _PLACE: self._place,
        }
        moving = self._hooks._sensitivities.state_dict()
        return state if moving is None else {**state, _THRESHOLDS: moving}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the wrapped optimizer's state; warn if it was saved under other settings.

        From then on the operating system seeds the noise and the samples, unless this optimizer
        has saved the state and added no noise since. A script that is started again with the same
        seed would otherwise draw again what it has drawn before the checkpoint. Only
        ``secure_mode`` goes on as it is: it has no seed.

        Raises:
            PrivacyViolationError: thresholds move, and clipped gradients wait for their noise.
            ValueError: the thresholds are of other layers, or out of range.
        """
        state, own = dict(state_dict), self._hooks._sensitivities
        place = state.pop(_PLACE, None)
        if own.policy is not None and self._guard.pending:
            raise PrivacyViolationError(
                "A checkpoint was loaded in the middle of a logical batch. Gradients clipped with "
                "the old thresholds would get the new ones' noise. Load it between step() and "
                "backward()."
            )
        thresholds = own.checked(state.pop(_THRESHOLDS, None))
        fingerprint.compare(state.pop(fingerprint.KEY, None), self._settings())
        self.original_optimizer.load_state_dict(state)
        own.load_state_dict(thresholds)
        self._hooks._whitening.stale = True
        if place is None or place != self._place:
            self._renew()

    def _begin_drawing(self) -> None:
        """Leave the place of a saved state, and make the generator if there is none yet.

        There is none where the model held no numbers when it was made private.
        """
        self._place = None
        if self.generator is None and not self.secure_mode and self._device.type != "meta":
            self.generator = apart(None, self._device, Purpose.NOISE, 0)

    def _renew(self) -> None:
        """Draw noise and samples from now on from numbers of the operating system."""
        if self.secure_mode:
            return
        self.generator = renewed(self.generator, self._device)
        if self._sampler is not None:
            self._sampler.renew()

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
        """Return all attributes, except a ``step`` with which a scheduler replaced the method."""
        # Torch's own method keeps only the attributes of a plain optimizer.
        return {name: value for name, value in vars(self).items() if name != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What was pickled may be loaded twice, and the original goes on.
        self._restore(state)
        self._renew()

    def _restore(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for p in self._summed:
            # Torch does not copy a parameter's attributes.
            p.summed_grad = getattr(p, "summed_grad", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy that shares the generator.

        A copied generator would draw the same noise again, and the difference of two releases
        would have none.
        """
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        memo[id(self.generator)] = self.generator
        copied._restore(copy.deepcopy(self.__getstate__(), memo))
        for p, own in zip(self._summed, copied._summed, strict=True):
            own.summed_grad = copy.deepcopy(p.summed_grad, memo)
        return copied
