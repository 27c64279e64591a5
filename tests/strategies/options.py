"""Ways to clip."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from hypothesis import strategies as st

from opacus_bpclip import BackpropClipping
from tests.budgets import layerwise

BOUNDS = ("product", "weighted", "exact")
MODES = tuple(itertools.product(BOUNDS, (False, True)))


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
    )


def accepted(clipping: BackpropClipping, dtype: torch.dtype, reduction: str) -> BackpropClipping:
    """Return a way to clip that is not refused behind a plain mean in single precision."""
    if dtype == torch.float64 or reduction == "sum":
        return clipping
    return replace(clipping, propagate="clipped")
