"""The subcommand ``opacus-bpclip ab``: options in, exit status out. Imports no torch by itself."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from opacus_bpclip.ab.settings import (
    ACCOUNTANTS,
    ARMS,
    DATASETS,
    DEVICES,
    FLAT_INPUT_CLIPPING,
    Output,
    Settings,
    settings_for,
)
from opacus_bpclip.config import Allocation, Bound, Upstream
from opacus_bpclip.jobs.arguments import StoreTuple
from opacus_bpclip.jobs.errors import JobError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_DESCRIPTION = """\
Train one model by several clipping methods on equal terms: same initial weights, same Poisson
batches, same noise multiplier, same accountant. Prints accuracy, epsilon, time per step and peak
memory of each arm, and plots accuracy over epsilon. Without options: scikit-learn's digits, about
a minute, nothing downloaded."""

_DEFAULT_PLOT = "opacus-bpclip-ab.png"


def add_parser(subparsers: _SubParsersAction[Any]) -> None:
    """Add the subcommand to the command line."""
    parser = subparsers.add_parser(
        "ab",
        help="compare clipping methods at equal privacy",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # An option that is not given stays out of the namespace: its default is the dataset's.
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(run=run)
    _add_data_options(parser)
    _add_training_options(parser)
    _add_clipping_options(parser)
    _add_output_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; 0 if it went well, 2 for wrong usage, 1 for a failed arm."""
    given = {name: value for name, value in vars(args).items() if name not in ("run", "command")}
    output = Output(
        **{
            name: given.pop(name)
            for name in ("json", "plot", "resume", "progress")
            if name in given
        }
    )
    try:
        settings = settings_for(**given)
        _run(settings, output, arms_given="arms" in given)
    except JobError as error:
        print(f"opacus-bpclip ab: error: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"opacus-bpclip ab: error: {error}", file=sys.stderr)
        return JobError.exit_status
    except KeyboardInterrupt:
        print("opacus-bpclip ab: interrupted", file=sys.stderr)
        return 130
    return 0


def _run(settings: Settings, output: Output, *, arms_given: bool) -> None:
    from opacus_bpclip.ab.job import compare
    from opacus_bpclip.ab.plot import draw
    from opacus_bpclip.ab.report import render

    if settings.max_input_norm is None and not arms_given:
        print(f"leaving out {FLAT_INPUT_CLIPPING}: --max-input-norm is none", file=sys.stderr)
    record = compare(settings, output)
    print(render(record))
    if output.plot:
        draw(record, output.plot)
        print(f"plot: {output.plot}")
    if output.json:
        print(f"data: {output.json}")


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data and arms")
    group.add_argument("--dataset", metavar="NAME", help=f"{_one_of(DATASETS)} (default: digits)")
    group.add_argument(
        "--data-root",
        metavar="DIR",
        help="folder of the dataset's files, downloaded if absent (default: ./data)",
    )
    group.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        type=str,
        action=StoreTuple,
        help=f"{_one_of(ARMS)} (default: all)",
    )
    group.add_argument(
        "--seeds",
        nargs="+",
        metavar="N",
        type=int,
        action=StoreTuple,
        help="one run each (default: 0 1 2)",
    )


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training, the same in every arm")
    group.add_argument(
        "--epsilon", type=float, metavar="X", help=f"privacy target ({_defaults('epsilon')})"
    )
    group.add_argument("--delta", type=float, metavar="X", help="privacy target (default: 1e-5)")
    group.add_argument("--epochs", type=int, metavar="N", help=_defaults("epochs"))
    group.add_argument(
        "--batch-size", type=int, metavar="N", help=f"expected size ({_defaults('batch_size')})"
    )
    group.add_argument("--lr", type=float, metavar="X", help=f"of SGD ({_defaults('lr')})")
    group.add_argument("--momentum", type=float, metavar="X", help="of SGD (default: 0.9)")
    group.add_argument(
        "--accountant", metavar="NAME", help=f"{_one_of(ACCOUNTANTS)} (default: prv)"
    )
    group.add_argument("--device", metavar="NAME", help=f"{_one_of(DEVICES)} (default: cpu)")
    group.add_argument(
        "--threads", type=int, metavar="N", help="of torch (default: 1 for digits, else all cores)"
    )


def _add_clipping_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("clipping")
    group.add_argument(
        "--max-grad-norm", type=float, metavar="X", help="joint L2 sensitivity (default: 1)"
    )
    group.add_argument(
        "--max-input-norm",
        type=_number_or_none,
        metavar="X",
        help="largest norm of a layer's input column in the arms flat+input-clipping and backprop, "
        "or none (default: 3)",
    )
    group.add_argument(
        "--bound",
        metavar="NAME",
        help=f"of backprop: {_one_of(get_args(Bound))} (default: exact, the closest to flat "
        "clipping)",
    )
    group.add_argument(
        "--allocation",
        metavar="NAME",
        help=f"of backprop: {_one_of(get_args(Allocation))} (default: dimension)",
    )
    group.add_argument(
        "--upstream",
        metavar="NAME",
        help=f"of backprop: {_one_of(get_args(Upstream))} (default: clip)",
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json", type=Path, metavar="FILE", help="write all facts here, after every finished arm"
    )
    group.add_argument(
        "--resume", action="store_true", help="keep the arms that the --json file holds already"
    )
    group.add_argument(
        "--plot",
        type=_path_or_none,
        default=Path(_DEFAULT_PLOT),
        metavar="FILE",
        help=f"write the plot here, or none (default: {_DEFAULT_PLOT})",
    )
    group.add_argument(
        "--no-progress",
        dest="progress",
        action="store_false",
        default=True,
        help="show no progress bars on stderr",
    )


def _number_or_none(text: str) -> float | None:
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or none, not {text!r}") from None


def _path_or_none(text: str) -> Path | None:
    return None if text == "none" else Path(text)


def _one_of(names: Any) -> str:
    return ", ".join(names)


def _defaults(name: str) -> str:
    values = ", ".join(f"{dataset} {getattr(own, name):g}" for dataset, own in DATASETS.items())
    return f"default: {values}"
