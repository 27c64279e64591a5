"""Generators that draw what no other generator has drawn.

Equal noise on two sums cancels in their difference, and steps on equal samples are not the
independent ones that the accountant composes. A generator that is seeded anew, restored or copied
draws the same numbers once more. So where training may have begun before, the numbers come from
the operating system. A state that is restored would not do: a checkpoint may be loaded twice.
"""

from __future__ import annotations

import secrets

import torch

from opacus_bpclip.guard.seeds import Purpose
from opacus_bpclip.guard.streams import keyed

_KEY = 32  # bytes


def fresh(device: torch.device) -> torch.Generator:
    """Return a generator that the operating system has seeded.

    Args:
        device: the generator's.
    """
    return keyed(secrets.token_bytes(_KEY), device)


def renewed(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """Return the generator, seeded by the operating system; a new one for torch's default one.

    Torch's default generator draws other things, too (dropout, say), and may be seeded again.

    Args:
        generator: is changed in place, so that all who share it go on with the new numbers.
        device: of a new generator.
    """
    if generator is None:
        return fresh(device)
    generator.set_state(fresh(generator.device).get_state())
    return generator


def apart(
    generator: torch.Generator | None, device: torch.device, purpose: Purpose, number: int
) -> torch.Generator:
    """Return a generator that is seeded from another one, for a numbered use.

    The same state, purpose and number give the same generator. Others begin in the same state with
    probability ``2**-256`` on a CPU, ``2**-64`` elsewhere.

    Args:
        generator: is advanced; ``None`` for torch's default one.
        device: of the new generator, if ``generator`` is ``None``.
        purpose: what it will draw.
        number: tells it from others that are made of generators in the same state.
    """
    device = device if generator is None else generator.device
    drawn = torch.empty(_KEY, dtype=torch.uint8, device=device).random_(generator=generator)
    place = f"apart {purpose.value} {number}".encode()
    return keyed(place + drawn.cpu().numpy().tobytes(), device)


def is_default(generator: torch.Generator | None) -> bool:
    """Return whether a generator is one of torch's own, which ``torch.manual_seed`` seeds.

    Args:
        generator: ``None`` for torch's default one.
    """
    own = (torch.default_generator, *torch.cuda.default_generators)
    return generator is None or any(generator is each for each in own)


def are_alike(one: torch.Generator | None, other: torch.Generator | None) -> bool:
    """Return whether two generators, which are not one, draw numbers of one stream.

    One may be ahead of the other: what it has drawn, the other will draw.

    Args:
        one: a generator; ``None`` for torch's default ones, which it seeds alike on all devices.
        other: the same.
    """
    default = one is None or other is None
    one, other = (torch.default_generator if own is None else own for own in (one, other))
    if one is other:
        return False
    alike = one.initial_seed() == other.initial_seed()
    if one.device != other.device:
        return default and alike
    return alike or torch.equal(one.get_state(), other.get_state())
