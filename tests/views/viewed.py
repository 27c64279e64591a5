"""A trainer of a model that gets several views of each example, and hostile batches for it."""

from __future__ import annotations

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping, CoverageError, FoldViews
from tests.checks import Trainer, linear_loss, squared_loss
from tests.joint.helpers import outputs_of
from tests.neighbours import REDUCTIONS, hostile_rows
from tests.strategies import accepted, architectures, clippings


class Viewed(Trainer):
    """A `Trainer` of a model in `FoldViews`.

    Args:
        model: gets single rows.
        shape: of a row.
        clipping: as for `Trainer`.
        views: of each example.
        **options: as for `Trainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        clipping: BackpropClipping,
        *,
        views: int,
        **options: object,
    ) -> None:
        super().__init__(FoldViews(model, views), (views, *shape), clipping, **options)  # type: ignore[arg-type]


@st.composite
def viewed(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> tuple[Trainer, Tensor, Tensor]:
    """Return a trainer, views and targets of any scale, whose last row is the example."""
    case = draw(architectures())
    views = draw(st.integers(1, 4))
    reduction = draw(REDUCTIONS)
    try:
        trainer = Viewed(
            case.layer.to(dtype),
            case.shape,
            accepted(draw(clippings()), dtype, reduction),
            views=views,
            max_grad_norm=draw(st.sampled_from([1e-3, 1.0, 1e3])),
            loss=draw(st.sampled_from([linear_loss, squared_loss])),
            reduction=reduction,
            dtype=dtype,
        )
    except CoverageError as error:
        # Of layers whose functions are followed.
        assume("clips an input only if its first axis is the batch alone" not in str(error))
        raise
    shape, outputs = (views, *case.shape), views * outputs_of(case.layer, case.shape)
    return trainer, *hostile_rows(draw, trainer.plain, shape, outputs, dtype)
