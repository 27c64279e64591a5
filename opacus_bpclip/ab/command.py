"""The subcommand ``opacus-bpclip ab``: options in, exit status out. Imports no torch by itself."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

from opacus_bpclip.ab.settings import (
    ACCOUNTANTS,
    ARMS,
    DATASETS,
    DEVICES,
    LAYERWISE_ALLOCATIONS,
    PRECISIONS,
    Output,
    settings_for,
)
from opacus_bpclip.config import Bound
from opacus_bpclip.jobs.arguments import Options, add_command
from opacus_bpclip.jobs.running import deliver, run_reported, take

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_DESCRIPTION = """\
Train one model by several clipping methods on equal terms: same initial weights, same Poisson
batches, same noise multiplier, same accountant. Prints accuracy, epsilon, time per step and peak
memory of each arm, and plots accuracy over epsilon. Without options: scikit-learn's digits, one
to two minutes, nothing downloaded."""

_DEFAULT_PLOT = "opacus-bpclip-ab.png"


def add_parser(subparsers: _SubParsersAction[Any]) -> None:
    """Add the subcommand to the command line."""
    summary = "compare clipping methods at equal privacy"
    parser = add_command(subparsers, "ab", run, summary=summary, description=_DESCRIPTION)
    _add_data_options(parser)
    _add_training_options(parser)
    _add_clipping_options(parser)
    _add_output_options(parser)


def run(args: Namespace) -> int:
    """Run the subcommand; 0 if it went well, 2 for wrong usage, 1 for a failed arm."""
    return run_reported(args, _run)


def _run(given: dict[str, Any]) -> int:
    output = take(Output, given)
    settings = settings_for(**given)

    from opacus_bpclip.ab.job import compare
    from opacus_bpclip.ab.plot import draw
    from opacus_bpclip.ab.report import render

    record = compare(settings, output)
    print(render(record))
    deliver("plot", output.plot, partial(draw, record))
    deliver("data", output.json)
    return 0


def _add_data_options(parser: ArgumentParser) -> None:
    group = Options(parser, "data and arms")
    group.text("--dataset", f"{_one_of(DATASETS)} (default: digits)")
    group.text(
        "--data-root",
        "folder of the dataset's files, downloaded if absent (default: ./data)",
        "DIR",
    )
    group.several("--arms", f"{_one_of(ARMS)} (default: all)", "ARM")
    group.several("--seeds", "one run each (default: 0 1 2)", "N", type=int)


def _add_training_options(parser: ArgumentParser) -> None:
    group = Options(parser, "training, the same in every arm")
    group.number("--epsilon", f"privacy target ({_defaults('epsilon')})")
    group.number("--delta", "privacy target (default: 1e-5)")
    group.integer("--epochs", _defaults("epochs"))
    group.integer("--batch-size", f"expected size ({_defaults('batch_size')})")
    group.number("--lr", f"of SGD ({_defaults('lr')})")
    group.number("--momentum", "of SGD (default: 0.9)")
    group.text("--accountant", f"{_one_of(ACCOUNTANTS)} (default: prv)")
    group.text("--device", f"{_one_of(DEVICES)} (default: cpu)")
    group.text("--precision", f"{_one_of(PRECISIONS)}, by autocast (default: float32)")
    group.integer("--threads", "of torch (default: 1 for digits, else all cores)")


def _add_clipping_options(parser: ArgumentParser) -> None:
    group = Options(parser, "clipping")
    group.number("--max-grad-norm", "joint L2 sensitivity (default: 1)")
    group.number_or_none(
        "--max-input-norm",
        "largest norm of a layer's input column in the arms backprop, backprop-layerwise and "
        "flat+input-clipping, or none (default: none, and 3 for flat+input-clipping)",
    )
    group.text(
        "--bound",
        f"of backprop and backprop-layerwise: {_one_of(get_args(Bound))} (default: exact)",
    )
    group.text(
        "--allocation",
        f"of backprop-layerwise: {_one_of(LAYERWISE_ALLOCATIONS)} (default: dimension)",
    )
    group.flag("--normalize", "backprop and backprop-layerwise scale gradients up, too")


def _add_output_options(parser: ArgumentParser) -> None:
    group = Options(parser, "output")
    group.json("finished arm")
    group.resume("the arms that")
    group.file_or_none(
        "--plot", f"write the plot here, or none (default: {_DEFAULT_PLOT})", _DEFAULT_PLOT
    )
    group.no_progress("show no progress bars on stderr")


def _one_of(names: Any) -> str:
    return ", ".join(names)


def _defaults(name: str) -> str:
    values = ", ".join(f"{dataset} {getattr(own, name):g}" for dataset, own in DATASETS.items())
    return f"default: {values}"
