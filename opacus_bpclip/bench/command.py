"""The subcommand ``opacus-bpclip bench``: options in, exit status out. Imports no torch itself."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opacus_bpclip.bench.settings import (
    ACCEPTANCE,
    ARMS,
    CASES,
    DEVICES,
    GROWTHS,
    PRECISIONS,
    Output,
    Point,
    Settings,
    default_arms,
    points,
)
from opacus_bpclip.jobs.arguments import Options, add_command
from opacus_bpclip.jobs.errors import UsageError
from opacus_bpclip.jobs.running import run_reported, take

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_DESCRIPTION = """\
Compare whole training steps: forward, loss, backward, clipping, noise, optimizer. Times are medians
of ratios to training the same model without privacy, paired in interleaved rounds in one process;
peak memory comes from a process for each arm. Nothing is downloaded."""


def add_parser(subparsers: _SubParsersAction[Any]) -> None:
    """Add the subcommand to the command line."""
    summary = "compare the time and memory of training steps"
    parser = add_command(subparsers, "bench", run, summary=summary, description=_DESCRIPTION)
    _add_options(parser)
    _add_output_options(parser)


def run(args: Namespace) -> int:
    """Run the subcommand; 0 if it went well, 2 for wrong usage, 1 for a failed measurement."""
    return run_reported(args, _run)


def _run(given: dict[str, Any]) -> int:
    output = take(Output, given)
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
    return 0


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


def _add_options(parser: ArgumentParser) -> None:
    group = Options(parser, "what to measure")
    group.several(
        "--case",
        f"all, or some of {', '.join(CASES)} (default: {' '.join(ACCEPTANCE)})",
        "CASE",
    )
    group.text("--growth", f"a growth curve in place of cases: {', '.join(GROWTHS)}", "SIZE")
    growth_arms = " ".join(default_arms("batch"))
    group.several(
        "--arms",
        f"some of {', '.join(ARMS)} (default: all; for a growth curve {growth_arms})",
        "ARM",
    )
    group.integer("--rounds", f"steps of every arm that count (default: {Settings.rounds})")
    group.number(
        "--limit",
        "start no more rounds of a comparison after this time, but do at least "
        f"{Settings.least_rounds} (default: {Settings.limit:g})",
        "SECONDS",
    )
    group.integer(
        "--processes",
        f"that share the rounds, one after the other (default: {Settings.processes})",
    )
    group.integer("--threads", "of torch (default: 1)")
    group.text("--device", f"{' or '.join(DEVICES)} (default: cpu)")
    group.text(
        "--precision",
        f"{' or '.join(PRECISIONS)}, by autocast and with losses that are summed "
        "(default: float32)",
    )


def _add_output_options(parser: ArgumentParser) -> None:
    group = Options(parser, "output")
    group.json("comparison")
    group.file(
        "--from-json",
        "start from the results in this file: add to them what is measured now, or render them if "
        "nothing else is asked for",
    )
    group.file("--markdown", "write the tables here, too")
    group.file("--plot", "draw the growth curves (needs matplotlib)")
    group.several("--update", "rewrite the generated blocks of these documents", "FILE", type=Path)
    group.no_progress("do not say on stderr what is being measured")
