"""The subcommand ``opacus-bpclip audit``: options in, status out. Imports no torch by itself."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opacus_bpclip.audit.settings import (
    ALPHA,
    BOUNDS,
    CASE_NAMES,
    DELTA,
    MAX_GRAD_NORM,
    REDUCTIONS,
    TRIALS,
    Output,
    Settings,
)
from opacus_bpclip.jobs.errors import JobError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_DESCRIPTION = """\
Measure what private training does, and compare it with its claim: how far one example moves the
noise-free sum, whether anything random depends on the data, the noise's law, and the smallest
epsilon that an attacker's success allows. Without options: every built-in case, in some minutes.
Exit status: 0 pass, 1 violation, 2 wrong usage, 3 no violation, but the audit was too weak."""

_OUTPUT = ("json", "markdown", "plot", "resume", "progress", "processes")
ASLEEP = 3


def add_parser(subparsers: _SubParsersAction[Any]) -> None:
    """Add the subcommand to the command line."""
    parser = subparsers.add_parser(
        "audit",
        help="measure sensitivity, noise and epsilon against what is claimed",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # An option that is not given stays out of the namespace: its default is the settings'.
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(run=run)
    _add_targets(parser)
    _add_strength(parser)
    _add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; the statuses are in its description."""
    given = {name: value for name, value in vars(args).items() if name not in ("run", "command")}
    output = Output(**{name: given.pop(name) for name in _OUTPUT if name in given})
    try:
        return _run(settings_for(**given), output)
    except (JobError, OSError) as error:
        print(f"opacus-bpclip audit: error: {error}", file=sys.stderr)
        return error.exit_status if isinstance(error, JobError) else JobError.exit_status
    except KeyboardInterrupt:
        print("opacus-bpclip audit: interrupted", file=sys.stderr)
        return 130


def settings_for(**given: Any) -> Settings:
    """Return the settings with the given values; a user's model is audited as it is trained."""
    if given.get("model"):
        given = {"bounds": ("weighted",), "loss_reductions": ("mean",), **given}
    return Settings(**given)


def _run(settings: Settings, output: Output) -> int:
    from opacus_bpclip.audit.job import run_audits
    from opacus_bpclip.audit.plot import draw
    from opacus_bpclip.audit.report import page, render
    from opacus_bpclip.jobs.files import write_whole

    record = run_audits(settings, output)
    print(render(record))
    if output.markdown:
        write_whole(output.markdown, page(record, ["opacus-bpclip", *sys.argv[1:]]))
        print(f"page: {output.markdown}")
    if output.plot:
        draw(record, output.plot)
        print(f"plot: {output.plot}")
    if output.json:
        print(f"data: {output.json}")
    outcomes = {verdict.outcome for _, verdict in record.in_order}
    return 1 if "violation" in outcomes else ASLEEP if "asleep" in outcomes else 0


def _add_targets(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is audited")
    group.add_argument(
        "--case",
        dest="cases",
        nargs="+",
        metavar="NAME",
        action=_Tuple,
        help=f"{', '.join(CASE_NAMES)} (default: all)",
    )
    group.add_argument(
        "--bound",
        dest="bounds",
        nargs="+",
        metavar="NAME",
        action=_Tuple,
        help=f"{', '.join(BOUNDS)} (default: all; weighted for --model)",
    )
    group.add_argument(
        "--loss-reduction",
        dest="loss_reductions",
        nargs="+",
        metavar="NAME",
        action=_Tuple,
        help=f"{', '.join(REDUCTIONS)} (default: both; mean for --model)",
    )
    group.add_argument(
        "--model",
        metavar="MODULE:FACTORY",
        help="a model of your own in place of the cases, trained by this package's engine",
    )
    group.add_argument(
        "--input",
        metavar="SHAPE|MODULE:FUNCTION",
        help="for --model: an example's shape, as 3x8x8, or a function that makes a batch of N",
    )
    group.add_argument(
        "--vocabulary", type=int, metavar="N", help="for a shape: the input is ids below N"
    )
    group.add_argument(
        "--loss",
        metavar="MODULE:FUNCTION",
        help="for --model: called with the output and the batch's other tensors (default: the "
        "worst one, which gives every output any gradient)",
    )
    group.add_argument(
        "--target",
        metavar="MODULE:FACTORY",
        help="makes an opacus_bpclip.audit.Target: training code of any kind; for example "
        "opacus_bpclip.audit.published:original",
    )
    group.add_argument(
        "--max-grad-norm",
        type=float,
        metavar="X",
        help=f"joint L2 sensitivity (default: {MAX_GRAD_NORM:g})",
    )
    group.add_argument(
        "--max-input-norm", type=_number_or_none, metavar="X", help="a number or none (default: 3)"
    )


def _add_strength(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how thoroughly")
    group.add_argument(
        "--full",
        action="store_true",
        help="judge every bound and loss of a case statistically, not one in rotation",
    )
    group.add_argument(
        "--trials",
        type=int,
        metavar="N",
        help=f"one-step trials in each world; 0 for the deterministic checks alone "
        f"(default: {TRIALS})",
    )
    group.add_argument("--noise-multiplier", type=float, metavar="X", help="(default: 1)")
    group.add_argument(
        "--alpha",
        type=float,
        metavar="X",
        help=f"chance of a faultless target to be convicted (default: {ALPHA:g})",
    )
    group.add_argument(
        "--delta", type=float, metavar="X", help=f"at which epsilon is taken (default: {DELTA:g})"
    )
    group.add_argument("--seed", type=int, metavar="N", help="of everything random (default: 0)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json", type=Path, metavar="FILE", help="write all facts here, after every target"
    )
    group.add_argument(
        "--resume", action="store_true", help="keep what the --json file holds already"
    )
    group.add_argument("--markdown", type=Path, metavar="FILE", help="write the report as a page")
    group.add_argument(
        "--plot", type=Path, metavar="FILE", help="write histograms of both worlds' scores"
    )
    group.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="targets audited at the same time, one thread each (default: one for each core)",
    )
    group.add_argument(
        "--no-progress",
        dest="progress",
        action="store_false",
        default=True,
        help="do not say on stderr what is finished",
    )


class _Tuple(argparse.Action):
    """Store the values as a tuple: settings are immutable."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the values."""
        setattr(namespace, self.dest, tuple(values))


def _number_or_none(text: str) -> float | None:
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or none, not {text!r}") from None
