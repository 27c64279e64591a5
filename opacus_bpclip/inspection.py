"""The subcommand ``opacus-bpclip inspect``: what would become of a model, layer by layer."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from opacus_bpclip.config import Allocation, BackpropClipping, Bound, is_positive_number

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from torch import nn


@dataclass(frozen=True)
class Row:
    """What is to be said of one module.

    Attributes:
        module: dotted path in the model.
        type: its class.
        parameters: trainable scalars.
        rule: what bounds their gradient, ``None`` where nothing does.
        max_input_norm: what its input is clipped to, ``None`` where it is not.
        bound: how its gradient is bounded.
        uses: how often it may be used in one forward pass.
        sensitivity: Delta_l, one for all layers that share a parameter; ``None`` while any module
            is refused.
        problem: why the model is refused, with the remedy; empty if it is not.
    """

    module: str
    type: str
    parameters: int
    rule: str | None
    max_input_norm: float | None
    bound: str
    uses: int
    sensitivity: float | None
    problem: str


def inspect(
    model: nn.Module, config: BackpropClipping | None = None, max_grad_norm: float = 1.0
) -> list[Row]:
    """Return a row for each module that would be trained or refused.

    Args:
        model: the model; it is not changed.
        config: how it would be clipped.
        max_grad_norm: joint L2 sensitivity of the summed gradient.

    Raises:
        CoverageError: the allocation names other layers than the model has.
        ValueError: ``max_grad_norm`` is not a finite number above zero.

    Example:
        >>> from torch import nn
        >>> [(row.module, row.rule, row.sensitivity) for row in inspect(nn.Linear(3, 2))]
        [('(root)', 'LinearRule', 1.0)]
    """
    from opacus_bpclip.allocation import layer_fractions
    from opacus_bpclip.coverage import examine, trainable_layers
    from opacus_bpclip.tying import tied_groups

    if not is_positive_number(max_grad_norm):
        raise ValueError(f"Expected max_grad_norm={max_grad_norm!r} to be a finite number > 0.")
    config = config or BackpropClipping()
    findings = examine(model)
    sensitivities: dict[str, float] = {}
    if findings and not any(found.problems for found in findings):
        groups = tied_groups(trainable_layers(model, config.declared_uses))
        sizes = {name: group.size for name, group in groups.items()}
        for name, part in layer_fractions(sizes, config.allocation).items():
            for layer in groups[name].layers:
                sensitivities[layer.name] = part * max_grad_norm
    return [
        Row(
            module=found.name,
            type=type(found.module).__name__,
            parameters=sum(parameter.numel() for parameter in found.parameters.values()),
            rule=None if found.rule is None else type(found.rule).__name__,
            max_input_norm=(
                config.max_input_norm if found.rule is not None and found.rule.clips_input else None
            ),
            bound=config.bound,
            uses=config.declared_uses.get(found.name, 1),
            sensitivity=sensitivities.get(found.name),
            problem=" ".join(found.problems),
        )
        for found in findings
    ]


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
        "--max-input-norm", type=_norm_or_none, default=3.0, metavar="NORM", help="a number or none"
    )
    parser.add_argument("--bound", choices=get_args(Bound), default="weighted")
    parser.add_argument("--allocation", choices=get_args(Allocation), default="dimension")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same facts as data")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; 0 if the model would train, 1 if it would be refused, 2 if misused."""
    try:
        config = BackpropClipping(
            max_input_norm=args.max_input_norm, bound=args.bound, allocation=args.allocation
        )
        rows = inspect(_load(args.model), config, args.max_grad_norm)
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


def render(rows: list[Row]) -> str:
    """Return the rows as a table, and the problems below it."""
    lines = [["module", "type", "parameters", "rule", "input norm", "bound", "uses", "sensitivity"]]
    lines += [
        [
            row.module,
            row.type,
            f"{row.parameters:,}",
            row.rule or "REFUSED",
            "-" if row.max_input_norm is None else f"{row.max_input_norm:g}",
            row.bound,
            str(row.uses),
            "-" if row.sensitivity is None else f"{row.sensitivity:.4f}",
        ]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = [
        "  ".join(
            cell.rjust(width) if column in (2, 4, 6, 7) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    problems = [f"- {row.problem}" for row in rows if row.problem]
    if problems:
        table += ["", "Refused:", *problems]
    return "\n".join(table)


def _load(path: str) -> nn.Module:
    """Import ``module:factory`` and make the model.

    Raises:
        ValueError: there is no such module, no such name in it, or what it makes is no model.
    """
    from torch import nn

    module_name, separator, attribute = path.partition(":")
    if not (separator and module_name and attribute):
        raise ValueError(f"{path!r} is not of the form MODULE:FACTORY, as in my_package.models:Net")
    # A console script does not look for modules where it is started.
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"cannot import {module_name}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module_name} has no {attribute}")
        found = getattr(found, part)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ValueError(f"{path} is neither a model nor callable")
        try:
            found = found()
        except TypeError as error:
            raise ValueError(f"{path} cannot be called without arguments: {error}") from error
    if not isinstance(found, nn.Module):
        raise ValueError(f"{path} makes a {type(found).__name__}, not a torch.nn.Module")
    return found


def _norm_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)
