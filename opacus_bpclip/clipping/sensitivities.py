"""The sensitivity and the threshold of each layer, or of the whole model with a joint budget.

A threshold is the norm from which on an example's gradient is scaled down. It may depend on the
steps before, since these are released, or on the number of the step. The sensitivities are
proportional to the thresholds, and together they are ``max_grad_norm`` whatever the thresholds are.
Proof: ``docs/guarantee.md``, "Moving thresholds".
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opacus_bpclip.clipping.allocation import layer_fractions, noise_weights, norm_of_each_use
from opacus_bpclip.clipping.factors import Target
from opacus_bpclip.config import (
    AdaptiveThreshold,
    BackpropClipping,
    ThresholdSchedule,
    is_positive_number,
)
from opacus_bpclip.model.tying import Group

_MODEL = "(model)"


class Sensitivities:
    """The sensitivities and thresholds, and how they move.

    Args:
        config: the public options.
        groups: by name, the layers that share parameters.

    Attributes:
        targets: by name, the target of each layer; with a joint budget the same for all.
        counts: by name, the parameters that receive the counts of examples within the thresholds;
            empty if none are counted. Their values mean nothing.
        released: by name, the noisy counts of the latest step, minus half the number of examples.
        noise_weights: how much harm the noise of each layer does; ``None`` for the same in all.
        steps: the number of steps that the thresholds have followed.
        max_grad_norm: the sensitivity of all layers together.
    """

    def __init__(self, config: BackpropClipping, groups: Mapping[str, Group]) -> None:
        self.groups, self.policy = groups, config.threshold
        self.joint = config.allocation == "joint"
        self.max_grad_norm = 1.0
        self.steps = 0
        sizes = {name: group.size for name, group in groups.items()}
        self.noise_weights = noise_weights(sizes, config.layer_noise)
        self._first = {_MODEL: 1.0} if self.joint else layer_fractions(sizes, config.allocation)
        self._values = self._first if self.policy is None else self._of(self.policy.initial)
        self.released: dict[str, float] = {}
        counted = self._first if isinstance(self.policy, AdaptiveThreshold) else ()
        # Where the first layer is; a model without one is refused elsewhere.
        device = next((p.device for group in groups.values() for p in group.parameters), None)
        self.counts = {
            name: nn.Parameter(torch.zeros((), dtype=torch.float64, device=device))
            for name in counted
        }
        self._own = {name: self._target(config, name) for name in self._first}
        self.targets = {
            layer.name: self._own[_MODEL if self.joint else name]
            for name, group in groups.items()
            for layer in group.layers
        }

    def _target(self, config: BackpropClipping, name: str) -> Target:
        norms = torch.ones(2, dtype=torch.float64, device="cpu")
        uses = 1 if self.joint else self.groups[name].uses
        return Target(norms, config.normalize, config.stability, self.counts.get(name), uses)

    def _of(self, threshold: float) -> dict[str, float]:
        """Return the layers' thresholds if a layer with an equal share has the given one."""
        assert self.policy is not None
        least, largest = self.policy.ends
        each = threshold * math.sqrt(len(self._first))
        return {name: min(max(each * f, least), largest) for name, f in self._first.items()}

    @property
    def all(self) -> dict[str, float]:
        """Return each layer's sensitivity; the squares sum to ``max_grad_norm ** 2``."""
        if self.policy is None:
            return {name: value * self.max_grad_norm for name, value in self._values.items()}
        norm = math.hypot(*self._values.values())
        return {name: value / norm * self.max_grad_norm for name, value in self._values.items()}

    @property
    def by_layer(self) -> dict[str, float]:
        """Return ``Delta_l`` by module name; empty with a joint budget."""
        return {} if self.joint else self.all

    @property
    def thresholds(self) -> dict[str, float]:
        """Return the thresholds by name, in units of the norm of an example's gradient."""
        return self.all if self.policy is None else dict(self._values)

    def set(self, max_grad_norm: float) -> None:
        """Set the sensitivity of all layers together."""
        self.max_grad_norm = max_grad_norm
        thresholds = self.thresholds
        for name, limit in self.all.items():
            target = self._own[name]
            each = [norm_of_each_use(norm, target.uses) for norm in (limit, thresholds[name])]
            target.norms.copy_(torch.tensor(each, dtype=torch.float64))

    def note(self, released: Sequence[Tensor]) -> None:
        """Note the counts that a step has released, in the order of `counts`."""
        self.released = dict(zip(self.counts, map(float, released), strict=True))

    def follow(self, expected: float) -> None:
        """Move the thresholds after a step, by the counts that were noted.

        Args:
            expected: the expected number of examples in the step, a public number.
        """
        self.steps += 1
        if isinstance(self.policy, AdaptiveThreshold):
            self._values = {
                name: self.policy.following(
                    value, 0.5 + self.released[name] / expected, self.steps - 1
                )
                for name, value in self._values.items()
            }
        elif isinstance(self.policy, ThresholdSchedule):
            self._values = self._of(self.policy.at(self.steps))
        else:
            return
        self.set(self.max_grad_norm)

    @property
    def checksum(self) -> int:
        """Return a number that differs where thresholds that move differ; 0 if they do not move."""
        return 0 if self.policy is None else zlib.crc32(repr(self.state_dict()).encode())

    def state_dict(self) -> dict[str, Any] | None:
        """Return what `load_state_dict` needs to go on; ``None`` if the thresholds do not move."""
        if self.policy is None:
            return None
        return {"thresholds": self.thresholds, "steps": self.steps}

    def checked(self, state: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Check a state for `load_state_dict`; return ``None`` if there is nothing to load.

        Warns if thresholds move and the state has none.

        Raises:
            ValueError: it is the state of other layers, or has thresholds that are out of range.
        """
        if self.policy is None:
            return None
        if state is None:
            warnings.warn(
                "The checkpoint has no thresholds, so that they go on from where they are: "
                f"{self.thresholds}.",
                stacklevel=3,
            )
            return None
        saved = state["thresholds"]
        if set(saved) != set(self._values):
            raise ValueError(
                f"The checkpoint has thresholds of {', '.join(saved)}; the model has them of "
                f"{', '.join(self._values)}. Load it with the model and the allocation that it was "
                "saved with."
            )
        least, largest = self.policy.ends
        for name, value in saved.items():
            if not is_positive_number(value) or not least <= value <= largest:
                raise ValueError(
                    f"The checkpoint has the threshold {value!r} for {name}; expected a number "
                    f"from {least} to {largest}."
                )
        return state

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on with the thresholds of a state that `checked` has returned."""
        if state is not None:
            self.steps, self._values = state["steps"], dict(state["thresholds"])
            self.set(self.max_grad_norm)
