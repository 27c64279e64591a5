"""Independent streams of pseudo-random numbers from one generator, to be drawn from at once.

A stream is seeded anew for every step, by numbers drawn from the generator. So the generator's
state is all there is to save: set back, it gives the same streams. Torch seeds a processor's
generator by 32 bits, of which a training run soon uses the same ones twice. A stream therefore
gets a whole state, 19,968 bits of it: a hash of a key of 256 bits, new for each step, and of the
stream's number, which differs within the step.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch

_STATE_WORDS = 624


def streams(generator: torch.Generator, count: int) -> list[torch.Generator]:
    """Return generators, of which the first is the one given, and the others follow from it.

    The same ones for the same state of the generator, which moves on. Any two of them, of one call
    or of two, begin in the same state with a chance of ``2**-256``.

    Args:
        generator: a processor's.
        count: how many at most. One, where this release of torch keeps states in another form than
            is known.
    """
    if count < 2 or not _state_is_known():
        return [generator]
    key = torch.empty(32, dtype=torch.uint8, device="cpu").random_(generator=generator)
    return [generator, *(_numbered(key.numpy().tobytes(), i) for i in range(1, count))]


def _numbered(key: bytes, number: int) -> torch.Generator:
    state = hashlib.shake_256(key + number.to_bytes(8, "little")).digest(4 * _STATE_WORDS)
    return _with_words(np.frombuffer(state, np.dtype("<u4")))


def _with_words(words: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> torch.Generator:
    """Return a generator whose next numbers are those of a Mersenne twister in this state."""
    generator = torch.Generator("cpu")
    state = generator.get_state()
    # Torch's form: the seed in 8 bytes, how many numbers of this round are left, whether there is a
    # seed, in 4 each, which number is next, in 8, and the words, in 8 each. In a fresh generator
    # the round is over, and no second number of a Gaussian pair waits.
    state[24 : 24 + 8 * _STATE_WORDS] = torch.from_numpy(words.astype(np.int64)).view(torch.uint8)
    generator.set_state(state)
    return generator


@lru_cache(maxsize=1)
def _state_is_known() -> bool:
    """Return whether torch draws what numpy's own Mersenne twister draws in a state."""
    words = np.arange(1, _STATE_WORDS + 1, dtype=np.uint32) * 2654435761
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": _STATE_WORDS}}
    try:
        drawn = torch.rand(8, dtype=torch.float32, device="cpu", generator=_with_words(words))
    except RuntimeError:  # the state has another size
        return False
    # Of each word, as many bits as a float32 holds.
    return bool((drawn.numpy() * 2**24 == twister.random_raw(8) % 2**24).all())
