"""The subcommand ``opacus-bpclip inspect``: show what would become of a model."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from opacus_bpclip.config import Allocation, BackpropClipping, Bound
from opacus_bpclip.inspection.inspection import Row, inspect, render
from opacus_bpclip.jobs.loading import load_object, made_by

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from torch import nn

    from opacus_bpclip.probe import Batch


_DEFAULT = BackpropClipping()


def add_parser(subparsers: _SubParsersAction[Any]) -> None:
    """Add the subcommand to the command line."""
    parser = subparsers.add_parser(
        "inspect",
        help="show how each layer of a model would be bounded, or why it would be refused",
        description="Show how each layer of a model would be bounded, or why it would be refused. "
        "The exit status is 1 if anything would be refused.",
    )
    parser.add_argument(
        "model",
        metavar="MODULE:FACTORY",
        help="an importable module and what in it makes the model when called without arguments, "
        "or is one; for example torchvision.models:resnet18",
    )
    parser.add_argument("--max-grad-norm", type=float, default=1.0, metavar="C")
    parser.add_argument(
        "--max-input-norm",
        type=_norm_or_none,
        default=_DEFAULT.max_input_norm,
        metavar="NORM",
        help="a number or none",
    )
    parser.add_argument("--bound", choices=get_args(Bound), default=_DEFAULT.bound)
    parser.add_argument("--allocation", choices=get_args(Allocation), default=_DEFAULT.allocation)
    parser.add_argument(
        "--uses",
        action="append",
        default=[],
        metavar="NAME=K",
        help="how often a layer is used in one forward pass, if more than once; auto counts",
    )
    parser.add_argument(
        "--input-shape",
        type=_shape,
        metavar="N,N,...",
        help="shape of one example, without the batch: the model is run on made-up examples to see "
        "whether they influence each other; for example 3,32,32",
    )
    parser.add_argument(
        "--input-dtype", choices=("float", "int"), default="float", help="int makes up ids 0 and 1"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same facts as data")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; 0 if the model would train, 1 if it would be refused, 2 if misused."""
    try:
        config = BackpropClipping(
            max_input_norm=args.max_input_norm,
            bound=args.bound,
            allocation=args.allocation,
            uses=_uses(args.uses),
        )
        batch = None if args.input_shape is None else _batch(args.input_shape, args.input_dtype)
        rows = _inspected(_load(args.model), config, args.max_grad_norm, batch)
        if args.json:
            args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    except (ValueError, OSError) as error:
        print(f"opacus-bpclip inspect: error: {error}", file=sys.stderr)
        return 2
    if not rows:
        print("The model has no trainable parameter.")
        return 1
    print(render(rows))
    return int(any(row.problem for row in rows))


def _inspected(
    model: nn.Module, config: BackpropClipping, max_grad_norm: float, batch: Batch | None
) -> list[Row]:
    from opacus_bpclip.probe import UntriedError

    if config.uses == "auto" and batch is None:
        raise ValueError("--uses auto counts on made-up examples: give their --input-shape")
    try:
        return inspect(model, config, max_grad_norm, batch)
    except UntriedError as error:
        raise ValueError(f"the model does not run on such an input: {error}") from error


def _batch(shape: tuple[int, ...], dtype: str) -> Batch:
    import torch

    from opacus_bpclip.probe import EXAMPLES, Batch

    like = torch.zeros(EXAMPLES, *shape, dtype=torch.float32 if dtype == "float" else torch.int64)
    return Batch((like,), {}, EXAMPLES, 0).invent(EXAMPLES)


def _uses(texts: list[str]) -> Literal["auto"] | dict[str, int]:
    if texts == ["auto"]:
        return "auto"
    uses = {}
    for text in texts:
        name, separator, count = text.rpartition("=")
        if not separator or not count.isdecimal():
            raise ValueError(f"--uses {text!r} is neither NAME=K nor auto alone")
        uses[name] = int(count)
    return uses


def _load(path: str) -> nn.Module:
    """Import ``module:factory`` and make the model.

    Raises:
        ValueError: there is no such module, no such name in it, or what it makes is no model.
    """
    from torch import nn

    found = load_object(path)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ValueError(f"{path} is neither a model nor callable")
        found = made_by(path)
    if not isinstance(found, nn.Module):
        raise ValueError(f"{path} makes a {type(found).__name__}, not a torch.nn.Module")
    return found


def _norm_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))
