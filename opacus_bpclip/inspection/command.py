"""The subcommand ``opacus-bpclip inspect``: show what would become of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter
from pydantic import BeforeValidator, TypeAdapter

from opacus_bpclip.config import Allocation, BackpropClipping, Bound
from opacus_bpclip.jobs.errors import UsageError, told_of_users_code
from opacus_bpclip.jobs.interrupts import ending_at_once
from opacus_bpclip.jobs.settings import Options
from opacus_bpclip.jobs.values import WHERE_TO_WRITE, Count, Finite, OrNone

if TYPE_CHECKING:
    from opacus_bpclip.inspection.inspection import Row
    from opacus_bpclip.probe import Batch

_DEFAULT = BackpropClipping()
# What follows an option's value may be the model.
_ONE_WORD = Parameter(consume_multiple=False)


def _parts(value: Any) -> list[str]:
    return [size for part in value for size in str(part).split(",")]


@Parameter(group=Group("How to clip, and what to try", sort_key=1))
class Settings(Options):
    """How a model would be clipped, and what it is tried on.

    Args:
        max_grad_norm: joint L2 sensitivity
        max_input_norm: largest norm of a column of a layer's input, or none
        bound: how an example's gradient norm is bounded
        allocation: how --max-grad-norm is spent on the layers
        uses: how often layers are used in one forward pass, as NAME=K, if more than once, each
            with a --uses of its own; auto counts
        input_shape: shape of one example, without the batch, as 3,32,32: the model is run on
            made-up examples to see whether they influence each other
        input_dtype: int makes up ids 0 and 1
        data: write the same facts to this file
    """

    max_grad_norm: Finite = 1.0
    max_input_norm: OrNone[Finite] = _DEFAULT.max_input_norm
    bound: Bound = _DEFAULT.bound
    allocation: Allocation = "joint"
    uses: Annotated[tuple[str, ...], _ONE_WORD] = ()
    input_shape: Annotated[tuple[Count, ...], BeforeValidator(_parts), _ONE_WORD] = ()
    input_dtype: Literal["float", "int"] = "float"
    data: Annotated[Path | None, WHERE_TO_WRITE, Parameter(name="--json")] = None


def inspect(
    model: Annotated[str, Parameter(name="MODULE:FACTORY")],
    /,
    *,
    settings: Settings = Settings(),
) -> int:
    """Show how each layer of a model would be bounded, or why it would be refused.

    The exit status is 1 if anything would be refused.

    Args:
        model: an importable module and what in it makes the model when called without arguments,
            or is one; for example torchvision.models:resnet18
    """
    from opacus_bpclip.inspection.inspection import Row, render
    from opacus_bpclip.jobs.files import check_writable, write_whole

    check_writable({"--json": settings.data})
    rows = _inspected(model, settings)
    if settings.data:
        data = TypeAdapter(list[Row]).dump_json(rows, indent=2)
        write_whole(settings.data, data.decode() + "\n")
    if not rows:
        print("The model has no trainable parameter.")
        return 1
    print(render(rows))
    return int(any(row.problem for row in rows))


def _inspected(model: str, settings: Settings) -> list[Row]:
    with ending_at_once():
        from torch import nn

        from opacus_bpclip.inspection.inspection import inspect
        from opacus_bpclip.jobs.loading import made_by
        from opacus_bpclip.probe import UntriedError

    try:
        uses = _uses(settings.uses)
        if uses == "auto" and not settings.input_shape:
            raise ValueError("--uses auto counts on made-up examples: give their --input-shape")
        config = BackpropClipping(
            max_input_norm=settings.max_input_norm,
            bound=settings.bound,
            allocation=settings.allocation,
            uses=uses,
        )
        batch = _batch(settings) if settings.input_shape else None
        return inspect(made_by(model, nn.Module), config, settings.max_grad_norm, batch)
    except UntriedError as error:
        raise UsageError(f"the model does not run on such an input: {error}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error


def _batch(settings: Settings) -> Batch:
    import torch

    from opacus_bpclip.probe import EXAMPLES, Batch

    dtype = torch.float32 if settings.input_dtype == "float" else torch.int64
    shape = settings.input_shape
    # Such a shape may need more memory than there is.
    with told_of_users_code(f"--input-shape {','.join(map(str, shape))}"):
        like = torch.zeros(EXAMPLES, *shape, dtype=dtype)
        return Batch((like,), {}, EXAMPLES, 0).invent(EXAMPLES)


def _uses(texts: tuple[str, ...]) -> Literal["auto"] | dict[str, int]:
    if texts == ("auto",):
        return "auto"
    parts = [text.rpartition("=") for text in texts]
    for text, (_, separator, count) in zip(texts, parts, strict=True):
        if not separator or not count.isdecimal():
            raise ValueError(f"--uses {text!r} is neither NAME=K nor auto alone")
    return {name: int(count) for name, _, count in parts}
