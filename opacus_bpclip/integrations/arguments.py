"""`PrivacyArguments`: what a private run needs beside the library's own arguments."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from opacus.accountants.utils import get_noise_multiplier

from opacus_bpclip.config import BackpropClipping, is_positive_number
from opacus_bpclip.guard.generators import fresh


@dataclass(frozen=True, kw_only=True)
class PrivacyArguments:
    """The privacy of a run.

    With ``target_epsilon`` alone, the noise is chosen so that all planned steps together spend it.
    With ``noise_multiplier`` alone, there is no limit. With both, training stops before the step
    that would spend more.

    Args:
        target_delta: the delta of every epsilon; less than one over the number of examples.
        target_epsilon: the largest epsilon to spend.
        noise_multiplier: the standard deviation of the noise, divided by ``max_grad_norm``.
        backprop: the options of the clipping; the defaults if ``None``.
        accountant: the name of Opacus's accountant.
        secure_mode: draw samples and noise from Opacus's cryptographic generator.
        noise_generator: the generator of the noise. By default one that the operating system
            seeds: the library's own seed is written into checkpoints, and whoever knows the
            noise can take it off again.
        sampling_generator: the generator of the samples; by default as for the noise.

    Raises:
        ValueError: a number is out of range, or neither noise nor target is given.
    """

    target_delta: float
    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    backprop: BackpropClipping | None = None
    accountant: str = "prv"
    secure_mode: bool = False
    noise_generator: torch.Generator | None = None
    sampling_generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not (is_positive_number(self.target_delta) and self.target_delta < 1):
            raise ValueError(
                f"Expected target_delta={self.target_delta!r} to be between 0 and 1, for example "
                "1e-5: less than one over the number of examples."
            )
        if self.target_epsilon is None and self.noise_multiplier is None:
            raise ValueError(
                "Expected a target_epsilon, for which the noise is chosen, a noise_multiplier, or "
                "both."
            )
        if self.target_epsilon is not None and not is_positive_number(self.target_epsilon):
            raise ValueError(
                f"Expected target_epsilon={self.target_epsilon!r} to be a finite number > 0."
            )

    def warn_of_delta(self, dataset: Any) -> None:
        """Warn if delta is so large that it allows to publish an example.

        Args:
            dataset: the training set, which has a length.
        """
        if self.target_delta * len(dataset) >= 1:
            warnings.warn(
                f"target_delta={self.target_delta:g} is not below 1 / {len(dataset)}, one over the "
                "number of examples: publishing one of them at random would be as private.",
                stacklevel=2,
            )

    def noise_for(self, sample_rate: float, steps: int) -> float:
        """Return the noise multiplier: the given one, or that with which the steps fit the target.

        Args:
            sample_rate: the probability that an item is in a batch.
            steps: the number of planned steps.
        """
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        return float(
            get_noise_multiplier(
                target_epsilon=self.target_epsilon,
                target_delta=self.target_delta,
                sample_rate=sample_rate,
                steps=steps,
                accountant=self.accountant,
            )
        )

    def generators(self, device: torch.device) -> tuple[torch.Generator, torch.Generator]:
        """Return the generators of the samples and of the noise.

        Args:
            device: the model's.
        """
        return (
            self.sampling_generator or fresh(torch.device("cpu")),
            self.noise_generator or fresh(device),
        )
