"""A measuring command from its settings to its exit status: check, resume, measure, keep, show."""

from __future__ import annotations

import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from opacus_bpclip.jobs.environment import versions
from opacus_bpclip.jobs.errors import UsageError
from opacus_bpclip.jobs.files import check_plot, check_writable, write_whole
from opacus_bpclip.jobs.record import UNKNOWN_COMMIT, Record
from opacus_bpclip.jobs.settings import Output
from opacus_bpclip.jobs.tables import PAGE, TERMINAL, Style

Kept = TypeVar("Kept", bound=Record[Any, Any])


class View(NamedTuple):
    """How a command's results are shown.

    Args:
        title: of the report as a page.
        report: returns the whole report.
        draw: writes the plot, in the format of the path's suffix.
        line: returns what is said on stderr of a result that has just come.
    """

    title: str
    report: Callable[[Any, Style], str]
    draw: Callable[[Any, Path], None]
    line: Callable[[Any], str]


class Job(ABC, Generic[Kept]):
    """What a command measures and how that reads; the rest is the same for all commands."""

    view: ClassVar[View]

    def check(self) -> None:
        """Find what would otherwise fail only after measuring.

        Raises:
            UsageError: something is missing or wrong.
        """

    @abstractmethod
    def begin(self) -> Kept:
        """Return the record to begin with, without the results of ``--resume``."""

    def todo(self, record: Kept) -> Sequence[Any]:
        """Return the keys of what is to be measured, given the results that are there."""
        return [key for key in record.wanted if record.result(key) is None]

    @abstractmethod
    def measure(self, record: Kept, todo: Sequence[Any]) -> Iterator[Any]:
        """Yield a result for each key, in any order."""

    def deliver(self, record: Kept) -> None:
        """Write what else was asked for."""

    def status(self, record: Kept) -> int:
        """Return the exit status of a run that found this."""
        return 0


def run(job: Job[Any], output: Output) -> int:
    """Do a command's work, write and print what it finds, and return its exit status.

    Raises:
        UsageError: something is wrong that was found before anything was measured.
        JobError: a measurement failed; what was finished before it is in the ``--json`` file.
    """
    record = measured(job, output)
    print(job.view.report(record, TERMINAL))
    if output.markdown:
        write_whole(output.markdown, page(job, record))
    if output.plot:
        job.view.draw(record, output.plot)
    job.deliver(record)
    for what, path in (("page", output.markdown), ("plot", output.plot), ("data", output.data)):
        if path:
            print(f"{what}: {path}")
    return job.status(record)


def measured(job: Job[Kept], output: Output) -> Kept:
    """Measure what is not there yet; the ``--json`` file is written after each result.

    Raises:
        UsageError, JobError: as for `run`.
    """
    if output.resume and not output.data:
        raise UsageError("--resume needs --json FILE, the file to continue from")
    check_plot(output.plot)
    check_writable({"--plot": output.plot, "--json": output.data, "--markdown": output.markdown})
    job.check()
    record = job.begin()
    if output.resume and output.data and output.data.exists():
        refusal = f"cannot resume from {output.data}"
        record = record.continued(type(record).read(output.data, f"{refusal}: it"), refusal)
    todo = job.todo(record)
    for number, result in enumerate(job.measure(record, todo), 1):
        record = record.with_result(result)
        if output.progress:
            line = f"{number} of {len(todo)}  {job.view.line(result)}"
            print(line, file=sys.stderr, flush=True)
        if output.data:
            record.write(output.data)
    if output.data:
        record.write(output.data)
    return record


def page(job: Job[Kept], record: Kept) -> str:
    """Return the report as a page in Markdown, with the command line that made it."""
    found = ", ".join(f"{name} {value}" for name, value in versions("torch", "opacus").items())
    parts = [
        f"# {job.view.title}",
        f"    {shlex.join(['opacus-bpclip', *sys.argv[1:]])}",
        f"Commit {record.commit or UNKNOWN_COMMIT}; {found}.",
        job.view.report(record, PAGE),
    ]
    return "\n\n".join(parts) + "\n"
