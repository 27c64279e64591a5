"""Seeds of generators that draw independently on each rank."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a rank's own generator draws: the Poisson sampling, or the noise."""

    SAMPLING = 0
    NOISE = 1


def seed_of(drawn: int, rank: int, purpose: Purpose) -> int:
    """Return a seed of 63 bits that no other rank and no other purpose has.

    Generators with equal seeds draw equal numbers. Two examples would then be sampled together
    always; equal noise at two places would cancel in their difference; noise would reveal which
    examples were sampled. The seeds of all ranks and purposes from one ``drawn`` differ in their
    low 32 bits, the only ones that a CPU's generator uses. The user may have given both purposes
    generators with one seed, so the seeds of the two purposes must differ as well.

    Args:
        drawn: the same random number on all ranks.
        rank: this process's rank.
        purpose: what the generator draws.

    Examples:
        >>> ranks = range(1000)
        >>> len({seed_of(7, rank, purpose) % 2**32 for rank in ranks for purpose in Purpose})
        2000
    """
    (first,) = np.random.SeedSequence([drawn]).generate_state(1)
    place = len(Purpose) * rank + purpose
    low = _permuted((int(first) + place) % 2**32)
    (high,) = np.random.SeedSequence([drawn, rank, purpose]).generate_state(1)
    return (int(high) >> 1) << 32 | low


def _permuted(number: int) -> int:
    """Permute the 32-bit numbers, neighbours far apart: the finalizer of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        number = (number ^ number >> shift) * factor % 2**32
    return number
