"""The subcommand ``opacus-bpclip audit``: options in, status out. Imports no torch by itself."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from functools import partial
from typing import TYPE_CHECKING, Any

from opacus_bpclip.audit.settings import (
    ALLOCATIONS,
    ALPHA,
    BOTH_BUDGETS,
    BOUNDS,
    CASE_NAMES,
    DELTA,
    MAX_GRAD_NORM,
    MAX_INPUT_NORM,
    REDUCTIONS,
    TRIALS,
    Output,
    Settings,
)
from opacus_bpclip.jobs.arguments import Options, add_command
from opacus_bpclip.jobs.running import deliver, run_reported, take

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_DESCRIPTION = """\
Measure what private training does, and compare it with its claim: how far one example moves the
noise-free sum, whether anything random depends on the data, the noise's law, and the smallest
epsilon that an attacker's success allows. Without options: every built-in case, in some minutes.
Exit status: 0 pass, 1 violation, 2 wrong usage, 3 no violation, but the audit was too weak."""

ASLEEP = 3


def add_parser(subparsers: _SubParsersAction[Any]) -> None:
    """Add the subcommand to the command line."""
    summary = "measure sensitivity, noise and epsilon against what is claimed"
    parser = add_command(subparsers, "audit", run, summary=summary, description=_DESCRIPTION)
    _add_targets(parser)
    _add_strength(parser)
    _add_output(parser)


def run(args: Namespace) -> int:
    """Run the subcommand; the statuses are in its description."""
    return run_reported(args, _run)


def settings_for(**given: Any) -> Settings:
    """Return the settings with the given values; a user's model is audited as it is trained."""
    if given.get("model"):
        usual = {"allocations": ("joint",), "bounds": ("exact",), "loss_reductions": ("mean",)}
        given = {**usual, **given}
    return Settings(**given)


def _run(given: dict[str, Any]) -> int:
    output = take(Output, given)
    settings = settings_for(**given)

    from opacus_bpclip.audit.job import run_audits
    from opacus_bpclip.audit.plot import draw
    from opacus_bpclip.audit.report import page, render
    from opacus_bpclip.jobs.files import write_whole

    record = run_audits(settings, output)
    print(render(record))
    command_line = ["opacus-bpclip", *sys.argv[1:]]
    deliver("page", output.markdown, lambda path: write_whole(path, page(record, command_line)))
    deliver("plot", output.plot, partial(draw, record))
    deliver("data", output.json)
    outcomes = {verdict.outcome for _, verdict in record.in_order}
    return 1 if "violation" in outcomes else ASLEEP if "asleep" in outcomes else 0


def _add_targets(parser: ArgumentParser) -> None:
    group = Options(parser, "what is audited")
    group.several("--case", f"{', '.join(CASE_NAMES)} (default: all)", dest="cases")
    group.several(
        "--allocation",
        f"{', '.join(ALLOCATIONS)} (default: {', '.join(BOTH_BUDGETS)}; joint for --model)",
        dest="allocations",
    )
    group.several(
        "--bound", f"{', '.join(BOUNDS)} (default: all; exact for --model)", dest="bounds"
    )
    group.several(
        "--loss-reduction",
        f"{', '.join(REDUCTIONS)} (default: both; mean for --model)",
        dest="loss_reductions",
    )
    group.text(
        "--model",
        "a model of your own in place of the cases, trained by this package's engine",
        "MODULE:FACTORY",
    )
    group.text(
        "--input",
        "for --model: an example's shape, as 3x8x8, or a function that makes a batch of N",
        "SHAPE|MODULE:FUNCTION",
    )
    group.integer("--vocabulary", "for a shape: the input is ids below N")
    group.text(
        "--loss",
        "for --model: called with the output and the batch's other tensors (default: the worst "
        "one, which gives every output any gradient)",
        "MODULE:FUNCTION",
    )
    group.text(
        "--target",
        "makes an opacus_bpclip.audit.Target: training code of any kind; for example "
        "opacus_bpclip.audit.published:original",
        "MODULE:FACTORY",
    )
    group.number("--max-grad-norm", f"joint L2 sensitivity (default: {MAX_GRAD_NORM:g})")
    group.number_or_none(
        "--max-input-norm",
        f"a number or none (default: {MAX_INPUT_NORM:g} for the product bound and for layerwise "
        "allocations, else none)",
    )


def _add_strength(parser: ArgumentParser) -> None:
    group = Options(parser, "how thoroughly")
    group.flag("--full", "judge every combination of a case statistically, not one in rotation")
    group.integer(
        "--trials",
        f"one-step trials in each world; 0 for the deterministic checks alone (default: {TRIALS})",
    )
    group.number("--noise-multiplier", "(default: 1)")
    group.number("--alpha", f"chance of a faultless target to be convicted (default: {ALPHA:g})")
    group.number("--delta", f"at which epsilon is taken (default: {DELTA:g})")
    group.integer("--seed", "of everything random (default: 0)")


def _add_output(parser: ArgumentParser) -> None:
    group = Options(parser, "output")
    group.json("target")
    group.resume("what")
    group.file("--markdown", "write the report as a page")
    group.file("--plot", "write histograms of both worlds' scores")
    group.integer(
        "--processes",
        "targets audited at the same time, one thread each (default: one for each core)",
        default=os.cpu_count() or 1,
    )
    group.no_progress("do not say on stderr what is finished")
