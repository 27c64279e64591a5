"""Many training steps in two worlds: what an attacker scores in each, and what the noise was."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opacus_bpclip.audit.noise_law import Array
from opacus_bpclip.audit.target import Batch, Target, Trainer, join

# Entries of the noise that are kept from each step.
WATCHED = 64


@dataclass(frozen=True)
class Trials:
    """Scores and noise, both in units of the noise's claimed standard deviation.

    Attributes:
        steps: in each trial.
        noise_multiplier: claimed.
        gap: how far apart the noise-free sums put the two worlds' scores.
        without: a score for each trial in the world without the canary.
        with_canary: the same with it.
        noise: ``[steps, entries]``, of the steps whose noise-free sum is known: all on an empty
            batch, or else the first one of every trial.
    """

    steps: int
    noise_multiplier: float
    gap: float
    without: Array
    with_canary: Array
    noise: Array


def run_trials(
    target: Target,
    batch: Batch,
    canary: Batch,
    *,
    noise_multiplier: float,
    trials: int,
    steps: int,
    seed: int,
) -> Trials:
    """Take ``steps`` training steps in either world, ``trials`` times, through the real code.

    The attacker knows everything except whether the canary takes part. Its score is the projection
    of the release, minus the sum of the batch's other examples, on the direction in which the
    canary moves the sum: the most powerful test against Gaussian noise. The worlds take turns. The
    parameters change with every step of a trial, and each trial starts from the first ones.

    Args:
        target: what is audited.
        batch: of the world without the canary.
        canary: added in the other world. If it does not change the sum, the attacker expects a
            change of the claimed size in a fixed direction.
        noise_multiplier: of the noise.
        trials: in each world.
        steps: in each trial.
        seed: of the noise.
    """
    trainer = target.trainer(noise_multiplier, seed)
    worlds = [batch, join(batch, canary)]
    silent = target.trainer(0.0, seed)
    sums = [silent.on(world) for world in worlds]
    # The seed alone decides the first parameters; the two attacks of an audit draw other noise.
    torch.manual_seed(seed + steps)
    unit = noise_multiplier * trainer.sensitivity
    change = sums[1] - sums[0]
    distance = float(change.norm())
    if not distance > 0:
        change, distance = torch.zeros_like(change), trainer.sensitivity
        change[0] = distance
    direction = change / distance
    watched = watched_entries(trainer, WATCHED)
    known = float(sums[0] @ direction) * steps
    scores = np.empty((trials, 2))
    noise: list[Tensor] = []
    for trial, world in itertools.product(range(trials), (0, 1)):
        trainer.restart()
        score = 0.0
        for step in range(steps):
            trainer.compute(worlds[world])
            released = trainer.release()
            if released is None:
                released = torch.full_like(direction, math.nan)
            score += float(released @ direction)
            if not len(batch[0]):
                if world == 0:
                    noise.append(released[watched])
            elif step == 0:
                noise.append((released - sums[world])[watched])
        scores[trial, world] = (score - known) / (unit * math.sqrt(steps))
    return Trials(
        steps=steps,
        noise_multiplier=noise_multiplier,
        gap=distance / unit * math.sqrt(steps),
        without=scores[:, 0],
        with_canary=scores[:, 1],
        noise=torch.stack(noise).double().numpy() / unit,
    )


def watched_entries(trainer: Trainer, count: int) -> Tensor:
    """Return which entries of the release to watch: the first ones of every parameter, in turn.

    Layers that shared a seed would have equal noise in their first entries.
    """
    places = torch.cat([torch.arange(p.numel()) for p in trainer.parameters])
    return places.argsort(stable=True)[:count].sort().values
