"""The generated blocks of documents: between two markers, rewritten from a record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from opacus_bpclip.bench.report import summary, tables
from opacus_bpclip.bench.results import BenchRecord
from opacus_bpclip.jobs.errors import UsageError
from opacus_bpclip.jobs.files import write_whole

BLOCKS: dict[str, Callable[[BenchRecord], str]] = {"bench-summary": summary, "bench-tables": tables}


def updated(text: str, record: BenchRecord) -> str:
    """Return a document's text with its blocks rewritten.

    A block named ``bench-summary`` is what stands between ``<!-- bench-summary -->`` and
    ``<!-- /bench-summary -->``.

    Raises:
        UsageError: the text has no block, or one without an end.
    """
    found = False
    for name, render in BLOCKS.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        if not start:
            continue
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not end:
            raise UsageError(f"the block {name} has no end: <!-- /{name} -->")
        text = f"{before}{start}\n{render(record)}\n\n{end}{after}"
        found = True
    if not found:
        raise UsageError(f"no block to update: <!-- {' --> or <!-- '.join(BLOCKS)} -->")
    return text


def read(path: Path, record: BenchRecord) -> str:
    """Return the text that a document is to have.

    Raises:
        UsageError: it cannot be read or has no whole block.
    """
    try:
        return updated(path.read_text(), record)
    except (OSError, UsageError) as error:
        raise UsageError(f"--update {path}: {error}") from error


def update(path: Path, record: BenchRecord) -> None:
    """Rewrite the blocks of a document.

    Raises:
        UsageError: it cannot be read or has no whole block.
    """
    write_whole(path, read(path, record))
