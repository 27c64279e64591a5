"""Ways to clip."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from hypothesis import strategies as st

from opacus_bpclip import BackpropClipping, InputWhitening
from tests.budgets import layerwise

BOUNDS = ("product", "weighted", "exact")
MODES = tuple(itertools.product(BOUNDS, (False, True)))


def of_the_trainer(step: int) -> object:
    """Stand for public examples that `tests.checks.Trainer` makes for its model."""
    raise AssertionError("public examples were asked for before the trainer has made them")


@st.composite
def whitenings(draw: st.DrawFn) -> InputWhitening:
    return InputWhitening(
        of_the_trainer,
        power=draw(st.sampled_from([0.25, 0.5])),
        damping=draw(st.sampled_from([1e-6, 1e-3, 1.0])),
        rank=draw(st.integers(1, 4) | st.just(32)),
        every=draw(st.integers(1, 3)),
    )


@st.composite
def clippings(draw: st.DrawFn) -> BackpropClipping:
    bound = draw(st.sampled_from(BOUNDS))
    norms = st.sampled_from([0.1, 1.0, 3.0, 100.0])
    return layerwise(
        bound=bound,
        max_input_norm=draw(norms if bound == "product" else st.one_of(st.none(), norms)),
        allocation=draw(st.sampled_from(["joint", "equal", "dimension"])),
        normalize=draw(st.booleans()),
        propagate=draw(st.sampled_from(["clipped", "unclipped"])),
        whitening=draw(st.none() | whitenings()) if bound == "exact" else None,
    )


def accepted(clipping: BackpropClipping, dtype: torch.dtype, reduction: str) -> BackpropClipping:
    """Return a way to clip that is not refused behind a plain mean in single precision."""
    if dtype == torch.float64 or reduction == "sum":
        return clipping
    return replace(clipping, propagate="clipped", whitening=None)
