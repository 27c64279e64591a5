"""The warnings that say nothing about a comparison."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def known_warnings_silenced() -> Iterator[None]:
    """Keep quiet what Opacus says of every run, and nothing else."""
    with warnings.catch_warnings():
        # A comparison measures on public data and protects nobody; its noise is seeded on purpose.
        warnings.filterwarnings("ignore", message="Secure RNG turned off", category=UserWarning)
        # Opacus attaches its hooks to every layer, and the first one's input is data.
        warnings.filterwarnings(
            "ignore", message="Full backward hook is firing", category=UserWarning
        )
        # Opacus's functorch mode asks for no autocast in a way that torch takes amiss on a CPU.
        warnings.filterwarnings("ignore", message="In CPU autocast", category=UserWarning)
        yield
