"""Independent streams of pseudo-random numbers from one generator, for several threads.

The streams are seeded at every step with numbers drawn from the generator, whose state alone
reproduces them. Torch seeds a CPU generator with 32 bits, so two streams of a training
run would soon have the same seed. A stream therefore gets a whole state of the Mersenne twister,
19,968 bits: a hash of a 256-bit key, drawn anew at each step, and of the stream's number.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch

_STATE_WORDS = 624


def streams(generator: torch.Generator, count: int) -> list[torch.Generator]:
    """Return a list of generators: the given one first, the others seeded from it.

    The same state of the given generator gives the same list; the call advances that state. Any
    two of the generators, of one call or of two, begin in the same state with probability
    ``2**-256``.

    Args:
        generator: a CPU generator.
        count: how many generators to return. Only the given one is returned where this release of
            torch keeps a generator's state in an unknown form.
    """
    if count < 2 or not _state_is_known():
        return [generator]
    key = torch.empty(32, dtype=torch.uint8, device="cpu").random_(generator=generator)
    return [generator, *(_numbered(key.numpy().tobytes(), i) for i in range(1, count))]


def keyed(key: bytes, device: torch.device) -> torch.Generator:
    """Return a generator whose state is a hash of a key.

    Args:
        key: at least 256 bits that are used once. Only 64 bits of their hash are kept where a
            generator has no larger state, or one of unknown form.
        device: the generator's.
    """
    if device.type == "cpu" and _state_is_known():
        return _hashed(key)
    seed = hashlib.shake_256(key).digest(8)
    return torch.Generator(device).manual_seed(int.from_bytes(seed, "little"))


def _numbered(key: bytes, number: int) -> torch.Generator:
    return _hashed(key + number.to_bytes(8, "little"))


def _hashed(key: bytes) -> torch.Generator:
    state = hashlib.shake_256(key).digest(4 * _STATE_WORDS)
    return _with_words(np.frombuffer(state, np.dtype("<u4")))


def _with_words(words: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> torch.Generator:
    """Return a generator that continues a Mersenne twister with these state words."""
    generator = torch.Generator("cpu")
    state = generator.get_state()
    # Torch's layout: the seed (8 bytes), the count of numbers left before the next twist and a flag
    # for the seed (4 each), the index of the next number (8), and the state words (8 each). A new
    # generator begins with a twist, and holds no second number of a Gaussian pair. As a seed it
    # names two of the words: seeds tell generators apart.
    state[:8] = torch.from_numpy(words[:2].copy()).view(torch.uint8)
    state[24 : 24 + 8 * _STATE_WORDS] = torch.from_numpy(words.astype(np.int64)).view(torch.uint8)
    generator.set_state(state)
    return generator


@lru_cache(maxsize=1)
def _state_is_known() -> bool:
    """Return whether torch and numpy's Mersenne twister draw the same from the same state."""
    words = np.arange(1, _STATE_WORDS + 1, dtype=np.uint32) * 2654435761
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": _STATE_WORDS}}
    try:
        drawn = torch.rand(8, dtype=torch.float32, device="cpu", generator=_with_words(words))
    except RuntimeError:  # the state has another size
        return False
    # Torch uses the lowest 24 bits of each word for a float32.
    return bool((drawn.numpy() * 2**24 == twister.random_raw(8) % 2**24).all())
