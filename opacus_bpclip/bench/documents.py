"""The generated blocks of documents: between two markers, rewritten from a record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from opacus_bpclip.bench.report import summary, tables
from opacus_bpclip.bench.results import BenchRecord
from opacus_bpclip.jobs.errors import UsageError

BLOCKS: dict[str, Callable[[BenchRecord], str]] = {"bench-summary": summary, "bench-tables": tables}


def updated(path: Path, record: BenchRecord) -> str:
    """Return a document's text with its blocks rewritten; the file itself is left as it is.

    A block named ``bench-summary`` is what stands between ``<!-- bench-summary -->`` and
    ``<!-- /bench-summary -->``.

    Raises:
        UsageError: the document cannot be read, has no block, or one without an end.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise UsageError(f"--update {path}: {error}") from error
    blocks = [name for name in BLOCKS if f"<!-- {name} -->\n" in text]
    if not blocks:
        markers = " or ".join(f"<!-- {name} -->" for name in BLOCKS)
        raise UsageError(f"--update {path}: no block to update: {markers}")
    for name in blocks:
        head, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, tail = rest.partition(f"<!-- /{name} -->")
        if not end:
            raise UsageError(f"--update {path}: the block {name} has no end: <!-- /{name} -->")
        text = f"{head}{start}\n{BLOCKS[name](record)}\n\n{end}{tail}"
    return text
