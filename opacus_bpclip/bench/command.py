"""The subcommand ``opacus-bpclip bench``: options in, exit status out. Imports no torch itself."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opacus_bpclip.bench.settings import (
    ACCEPTANCE,
    ARMS,
    CASES,
    DEVICES,
    GROWTHS,
    Output,
    Point,
    Settings,
    default_arms,
    points,
)
from opacus_bpclip.jobs.arguments import StoreTuple
from opacus_bpclip.jobs.errors import JobError, UsageError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_DESCRIPTION = """\
Compare whole training steps: forward, loss, backward, clipping, noise, optimizer. Times are medians
of ratios to training the same model without privacy, paired in interleaved rounds in one process;
peak memory comes from a process for each arm. Nothing is downloaded."""


def add_parser(subparsers: _SubParsersAction[Any]) -> None:
    """Add the subcommand to the command line."""
    parser = subparsers.add_parser(
        "bench",
        help="compare the time and memory of training steps",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # An option that is not given stays out of the namespace.
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(run=run)
    _add_options(parser)
    _add_output_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; 0 if it went well, 2 for wrong usage, 1 for a failed measurement."""
    given = {name: value for name, value in vars(args).items() if name not in ("run", "command")}
    try:
        _run(given)
    except JobError as error:
        print(f"opacus-bpclip bench: error: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"opacus-bpclip bench: error: {error}", file=sys.stderr)
        return JobError.exit_status
    except KeyboardInterrupt:
        print("opacus-bpclip bench: interrupted", file=sys.stderr)
        return 130
    return 0


def _run(given: dict[str, Any]) -> None:
    names = ("from_json", "json", "markdown", "plot", "update", "progress")
    output = Output(**{name: given.pop(name) for name in names if name in given})
    todo, settings = _what(given, output)

    from opacus_bpclip.bench.documents import update
    from opacus_bpclip.bench.job import measure
    from opacus_bpclip.bench.plot import draw
    from opacus_bpclip.bench.report import tables

    record = measure(todo, settings, output)
    text = tables(record)
    print(text)
    if output.markdown:
        output.markdown.write_text(text + "\n")
    for document in output.update:
        update(document, record)
    if output.plot:
        draw(record, output.plot)


def _what(given: dict[str, Any], output: Output) -> tuple[list[Point], Settings]:
    """Return what to measure, nothing for a file that is only rendered, and how."""
    case, growth = given.pop("case", None), given.pop("growth", None)
    if case is not None and growth is not None:
        raise UsageError("--growth has a case of its own: leave --case out")
    if output.plot and growth is None and output.from_json is None:
        raise UsageError("--plot draws growth curves: it needs --growth or --from-json")
    if output.from_json and case is None and growth is None:
        if given:
            raise UsageError(f"--{next(iter(given))} with --from-json needs --case or --growth")
        return [], Settings()
    names = tuple(CASES) if case == ("all",) else case or ACCEPTANCE
    return points(names, growth), Settings(**{"arms": default_arms(growth), **given})


def _add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to measure")
    group.add_argument(
        "--case",
        nargs="+",
        action=StoreTuple,
        metavar="CASE",
        help=f"all, or some of {', '.join(CASES)} (default: {' '.join(ACCEPTANCE)})",
    )
    group.add_argument(
        "--growth", metavar="SIZE", help=f"a growth curve in place of cases: {', '.join(GROWTHS)}"
    )
    group.add_argument(
        "--arms",
        nargs="+",
        action=StoreTuple,
        metavar="ARM",
        help=f"some of {', '.join(ARMS)} (default: all; for a growth curve "
        f"{' '.join(default_arms('batch'))})",
    )
    group.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help=f"steps of every arm that count (default: {Settings.rounds})",
    )
    group.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        help="start no more rounds of a comparison after this time, but do at least "
        f"{Settings.least_rounds} (default: {Settings.limit:g})",
    )
    group.add_argument("--threads", type=int, metavar="N", help="of torch (default: 1)")
    group.add_argument("--device", metavar="NAME", help=f"{' or '.join(DEVICES)} (default: cpu)")


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json", type=Path, metavar="FILE", help="write all facts here, after every comparison"
    )
    group.add_argument(
        "--from-json",
        type=Path,
        metavar="FILE",
        help="start from the results in this file: add to them what is measured now, or render "
        "them if nothing else is asked for",
    )
    group.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here, too")
    group.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the growth curves (needs matplotlib)"
    )
    group.add_argument(
        "--update",
        nargs="+",
        action=StoreTuple,
        type=Path,
        metavar="FILE",
        help="rewrite the generated blocks of these documents",
    )
    group.add_argument(
        "--no-progress",
        dest="progress",
        action="store_false",
        default=True,
        help="do not say on stderr what is being measured",
    )
