"""Seeds, and numbers of every size."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

seeds = st.integers(0, 2**31 - 1)
scales = st.integers(-30, 30).map(lambda exponent: 10.0**exponent)


def seed_torch(draw: st.DrawFn) -> None:
    # torch.manual_seed formats the stack for devices that are not there: a quarter of a search.
    torch.default_generator.manual_seed(draw(seeds))
