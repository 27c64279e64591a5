"""Hostile examples and batches of them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies.numbers import scales, seeds


@st.composite
def hostile_examples(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One example: noise, a single spike, constant, zero, inf or nan, at any scale."""
    generator = torch.Generator().manual_seed(draw(seeds))
    kind = draw(st.sampled_from(["normal", "normal", "spike", "constant", "zero", "inf", "nan"]))
    x = torch.zeros(shape, dtype=dtype)
    flat = x.view(-1)
    position = draw(st.integers(0, flat.numel() - 1)) if flat.numel() else 0
    if kind == "normal":
        x.normal_(generator=generator)
    elif kind == "constant":
        x.fill_(1.0)
    elif kind != "zero":
        flat[position] = {"spike": 1.0, "inf": float("inf"), "nan": float("nan")}[kind]
    return x * draw(scales)


@st.composite
def hostile_batches(
    draw: st.DrawFn,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    min_size: int = 0,
) -> Tensor:
    """``[B, *shape]`` with B from ``min_size`` to 5."""
    rows = [draw(hostile_examples(shape, dtype)) for _ in range(draw(st.integers(min_size, 5)))]
    return torch.stack(rows) if rows else torch.zeros(0, *shape, dtype=dtype)


@st.composite
def sequences(draw: st.DrawFn, count: int, steps: int, width: int) -> tuple[Tensor, Tensor]:
    """Sequences of normal numbers and targets for all of them, examples of three sizes each."""
    x = torch.randn(count, steps, width, dtype=torch.float64)
    target = torch.randn(count, steps * width, dtype=torch.float64)
    sizes = st.lists(st.sampled_from([0.1, 1.0, 10.0]), min_size=count, max_size=count)
    rows, heights = (torch.tensor(draw(sizes), dtype=torch.float64) for _ in range(2))
    return x * rows[:, None, None], target * heights[:, None]
