"""The generators of all that one engine makes private: no two draw the same numbers."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import opacus
import torch

from opacus_bpclip.guard.generators import apart, are_alike, fresh, is_default
from opacus_bpclip.guard.seeds import Purpose
from opacus_bpclip.optimizer.wrapper import OptimizerWrapper

_SOURCES = "_backprop_sources"


class Sources:
    """What an engine has made private, and where the next numbers come from.

    The first call of ``make_private`` draws from the user's generators as they are. Each later one
    draws from generators that are seeded from the user's and from its number, since the user may
    have seeded all of them alike. In place of torch's default generator there is one that it seeds:
    a data set, a transform or the training loop may seed the default one again, and the same noise
    would come again. After a checkpoint the operating system seeds them.

    Attributes:
        latest: the optimizer of the latest call with ``clipping="backprop"``.
    """

    def __init__(self) -> None:
        self.latest: OptimizerWrapper | None = None
        self._made = 0
        self._resumed = False
        self._optimizers: WeakSet[OptimizerWrapper] = WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        # The copy of an engine must not make again what the original makes.
        return {"latest": self.latest, "_made": self._made, "_resumed": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._optimizers = WeakSet([] if self.latest is None else [self.latest])

    def own(
        self, generator: torch.Generator | None, device: torch.device, purpose: Purpose
    ) -> torch.Generator | None:
        """Return the generator for the present call of ``make_private``.

        Args:
            generator: the user's; ``None`` for torch's default one.
            device: of the numbers, if ``generator`` is ``None``.
            purpose: what they are for.
        """
        if device.type == "meta":
            return generator  # No number is drawn there.
        if self._resumed:
            return fresh(device if generator is None else generator.device)
        # Torch's default generator has made the initial weights. Who knows them could tell the
        # samples and the noise of another generator with its seed.
        if self._made or is_default(generator) or are_alike(generator, None):
            return apart(generator, device, purpose, self._made)
        return generator

    def add(self, optimizer: OptimizerWrapper) -> None:
        """Note what a call of ``make_private`` has returned."""
        sampler, noise = optimizer._sampler, optimizer.generator
        # Torch's default generator of an accelerator is none of those that sample.
        on_cpu = noise is not None or optimizer._device.type == "cpu"
        secure = optimizer.secure_mode
        if sampler and on_cpu and not secure and are_alike(sampler.generator, noise):
            # Noise would reveal which examples were sampled.
            optimizer.generator = apart(noise, optimizer._device, Purpose.NOISE, self._made)
        self._made += 1
        self.latest = optimizer
        self._optimizers.add(optimizer)

    def resume(self) -> None:
        """Let nothing that was drawn before a checkpoint be drawn again."""
        self._resumed = True
        for optimizer in self._optimizers:
            optimizer._renew()


def sources_of(engine: opacus.PrivacyEngine) -> Sources:
    """Return an engine's sources.

    An engine whose accountant has steps, although it has made nothing private, goes on from a
    checkpoint that was loaded by hand.
    """
    sources: Sources | None = getattr(engine, _SOURCES, None)
    if sources is None:
        sources = Sources()
        sources._resumed = bool(engine.accountant.history)
        setattr(engine, _SOURCES, sources)
    return sources
