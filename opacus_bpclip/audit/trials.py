"""Many training steps in two worlds: what an attacker scores in each, and what the noise was."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opacus_bpclip.audit.neighbours import quiet_trainer, seeded_trainer, sum_without_noise
from opacus_bpclip.audit.noise_law import Array
from opacus_bpclip.audit.target import Batch, Target, Trainer, join

# Entries of the noise that are kept from each step.
WATCHED = 64


@dataclass(frozen=True)
class Trials:
    """Scores and noise, both in units of the noise's claimed standard deviation.

    Attributes:
        without: a score for each trial in the world without the canary.
        with_canary: the same with it.
        gap: how far apart the noise-free sums put the two worlds' scores.
        noise_without: ``[steps, entries]``, from the steps without the canary.
        noise: from all first steps of a trial, whose noise-free sum is known.
    """

    without: Array
    with_canary: Array
    gap: float
    noise_without: Array
    noise: Array


def run_trials(
    target: Target,
    batch: Batch,
    canary: Batch | None,
    *,
    noise_multiplier: float,
    trials: int,
    steps: int,
    seed: int,
) -> Trials:
    """Take ``steps`` training steps in either world, ``trials`` times, through the real code.

    The attacker knows all but the canary's presence. His score is the projection of what was
    released, less what the batch's other examples amount to, on the direction in which the canary
    moves the sum: the most powerful test against Gaussian noise. The worlds take turns. The
    parameters move with every step of a trial and start afresh with the next one.

    Args:
        target: what is audited.
        batch: of the world without the canary.
        canary: added in the other world; ``None`` makes both worlds the same, and asks in a fixed
            direction for a change of the claimed size.
        noise_multiplier: of the noise.
        trials: in each world.
        steps: in each trial.
        seed: of the noise.
    """
    trainer = seeded_trainer(target, noise_multiplier, seed)
    worlds = [batch, batch if canary is None else join(batch, canary)]
    quiet = quiet_trainer(target, seed)
    sums = [sum_without_noise(quiet, world) for world in worlds]
    # Where the parameters start is the seed's; the noise is this attack's own.
    torch.manual_seed(seed + steps)
    unit = noise_multiplier * trainer.sensitivity
    direction, change = _direction(sums[1] - sums[0])
    if canary is None:
        change = trainer.sensitivity
    watched = watched_entries(trainer, WATCHED)
    known = float(sums[0] @ direction) * steps
    scores = np.empty((trials, 2))
    noise: list[Tensor] = []
    quiet_world: list[Tensor] = []
    for trial, world in itertools.product(range(trials), (0, 1)):
        trainer.restart()
        score = 0.0
        for step in range(steps):
            trainer.compute(worlds[world])
            released = trainer.release()
            if released is None:
                released = torch.full_like(direction, math.nan)
            score += float(released @ direction)
            if step == 0:
                noise.append((released - sums[world])[watched])
            if world == 0 and not len(batch[0]):
                quiet_world.append(released[watched])
        scores[trial, world] = (score - known) / (unit * math.sqrt(steps))
    return Trials(
        without=scores[:, 0],
        with_canary=scores[:, 1],
        gap=change / unit * math.sqrt(steps),
        noise_without=_stacked(quiet_world, unit, len(watched)),
        noise=_stacked(noise, unit, len(watched)),
    )


def watched_entries(trainer: Trainer, count: int) -> Tensor:
    """Return which entries of the release to watch: the first ones of every parameter, in turn.

    Layers that shared a seed would have equal noise in their first entries.
    """
    sizes = [p.numel() for p in trainer.parameters]
    starts = [0, *itertools.accumulate(sizes)]
    entries = (
        start + place
        for place in range(max(sizes))
        for start, size in zip(starts, sizes, strict=False)
        if place < size
    )
    return torch.tensor(sorted(itertools.islice(entries, count)))


def _direction(change: Tensor) -> tuple[Tensor, float]:
    norm = float(change.norm())
    if norm > 0:
        return change / norm, norm
    direction = torch.zeros_like(change)
    direction[0] = 1.0
    return direction, 0.0


def _stacked(rows: list[Tensor], unit: float, entries: int) -> Array:
    if not rows:
        return np.empty((0, entries))
    stacked: Array = torch.stack(rows).double().numpy() / unit
    return stacked
