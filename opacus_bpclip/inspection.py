"""The subcommand ``opacus-bpclip inspect``: what would become of a model, layer by layer."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from opacus_bpclip.config import Allocation, BackpropClipping, Bound, is_positive_number

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from torch import nn

    from opacus_bpclip.probe import Batch


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
    model: nn.Module,
    config: BackpropClipping | None = None,
    max_grad_norm: float = 1.0,
    batch: Batch | None = None,
) -> list[Row]:
    """Return a row for each module that would be trained or refused.

    Args:
        model: the model; it is not changed.
        config: how it would be clipped.
        max_grad_norm: joint L2 sensitivity of the summed gradient.
        batch: examples to try the model on, for coupling and for ``uses="auto"``.

    Raises:
        CoverageError: the allocation or the uses name other layers than the model has.
        UntriedError: the model does not run on the batch.
        ValueError: ``max_grad_norm`` is not a finite number above zero.

    Example:
        >>> from torch import nn
        >>> [(row.module, row.rule, row.sensitivity) for row in inspect(nn.Linear(3, 2))]
        [('(root)', 'LinearRule', 1.0)]
    """
    from opacus_bpclip.allocation import layer_fractions
    from opacus_bpclip.coverage import Finding, examine, trainable_layers
    from opacus_bpclip.probe import count_uses, find_coupling
    from opacus_bpclip.tying import tied_groups

    if not is_positive_number(max_grad_norm):
        raise ValueError(f"Expected max_grad_norm={max_grad_norm!r} to be a finite number > 0.")
    config = config or BackpropClipping()
    findings = {found.name: found for found in examine(model)}
    fine = bool(findings) and not any(found.problems for found in findings.values())
    if fine and batch is not None:
        if config.uses == "auto":
            config = replace(config, uses=count_uses(model, batch))
        problem = find_coupling(model, batch, loss_reduction="mean") if config.probe else None
        if problem is not None:
            fine = False
            module = model if problem.module == "(root)" else model.get_submodule(problem.module)
            found = findings.get(problem.module, Finding(problem.module, module, {}, None))
            findings[problem.module] = replace(found, problems=(problem.text,))
    uses = config.declared_uses if fine else {}
    sensitivities: dict[str, float] = {}
    if fine:
        groups = tied_groups(trainable_layers(model, uses))
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
            uses=uses.get(found.name, 1),
            sensitivity=sensitivities.get(found.name),
            problem=" ".join(found.problems),
        )
        for found in findings.values()
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
    problems = _grouped(rows)
    if problems:
        table += ["", "Refused:", *problems]
    return "\n".join(table)


def _grouped(rows: list[Row]) -> list[str]:
    """Return the problems, each once, with the modules that have it."""
    modules: dict[str, list[str]] = {}
    for row in rows:
        if row.problem:
            modules.setdefault(row.problem.replace(row.module, "{}", 1), []).append(row.module)
    lines = []
    for problem, names in modules.items():
        more = f" and {len(names) - 2} more" if len(names) > 3 else ""
        shown = ", ".join(names[:2] if more else names) + more
        lines.append(f"- {problem.replace('{}', shown, 1)}")
    return lines


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


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))
