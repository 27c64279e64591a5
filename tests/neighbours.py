"""Draws a private model, a hostile batch, and the example that is added last to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping
from tests.checks import Trainer, linear_loss, squared_loss
from tests.joint.helpers import outputs_of
from tests.strategies import (
    NO_EMPTY_BATCH,
    accepted,
    architectures,
    clippings,
    hostile_batches,
    hostile_examples,
    scales,
)

REDUCTIONS = st.sampled_from(["mean", "sum"])


@st.composite
def neighbours(
    draw: st.DrawFn,
    trainer_of: Callable[..., Trainer] = Trainer,
    dtype: torch.dtype = torch.float64,
    clipping: st.SearchStrategy[BackpropClipping] | None = None,
    **options: st.SearchStrategy[object],
) -> tuple[Trainer, Tensor, Tensor]:
    """Return a trainer, inputs and targets of any scale, whose last row is the example.

    Args:
        draw: Hypothesis's.
        trainer_of: makes the trainer of a model, its input's shape, ways to clip and options.
        dtype: of the model and of what it is given.
        clipping: draws how to clip; in all ways by default.
        **options: draw further options of the trainer.
    """
    case = draw(architectures())
    drawn = {name: draw(values) for name, values in options.items()}
    how = draw(clippings() if clipping is None else clipping)
    trainer = trainer_of(
        case.layer.to(dtype),
        case.shape,
        accepted(how, dtype, str(drawn.get("reduction", "mean"))),
        max_grad_norm=draw(st.sampled_from([1e-3, 1.0, 1e3])),
        loss=draw(st.sampled_from([linear_loss, squared_loss])),
        dtype=dtype,
        **drawn,
    )
    outputs = outputs_of(trainer.plain, case.shape)
    return trainer, *hostile_rows(draw, trainer.plain, case.shape, outputs, dtype)


def hostile_rows(
    draw: st.DrawFn, model: nn.Module, shape: tuple[int, ...], outputs: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of any scale, whose last row is the example.

    Args:
        draw: Hypothesis's.
        model: what they are for.
        shape: of an example.
        outputs: the number of outputs for an example.
        dtype: of both.
    """
    alone = not any(isinstance(module, NO_EMPTY_BATCH) for module in model.modules())
    companions = draw(hostile_batches(shape, dtype, min_size=0 if alone else 1))
    x = torch.cat([companions, draw(hostile_examples(shape, dtype))[None]])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    target = torch.randn(len(x), outputs, generator=generator).to(dtype)
    rows = torch.tensor([draw(scales) for _ in range(len(x))], dtype=torch.float64).to(dtype)
    return x, target * rows[:, None]
