"""The generated blocks of documents, and that the published ones say what the data says."""

from pathlib import Path

import pytest

from opacus_bpclip.bench.documents import read, update, updated
from opacus_bpclip.bench.report import summary, tables
from opacus_bpclip.bench.results import BenchRecord
from opacus_bpclip.jobs.errors import UsageError
from tests.bench.tiny import CNN, record

ROOT = Path(__file__).parents[2]
TEXT = """before
<!-- bench-summary -->
old
<!-- /bench-summary -->
between
<!-- bench-tables -->
<!-- /bench-tables -->
after
"""


def test_blocks_are_rewritten_and_nothing_else(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(TEXT)
    update(path, record(CNN))
    short, long = summary(record(CNN)), tables(record(CNN))
    assert path.read_text() == (
        f"before\n<!-- bench-summary -->\n\n{short}\n\n<!-- /bench-summary -->\n"
        f"between\n<!-- bench-tables -->\n\n{long}\n\n<!-- /bench-tables -->\nafter\n"
    )
    assert updated(path.read_text(), record(CNN)) == path.read_text()


def test_a_document_without_a_block_is_refused(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("no block\n")
    with pytest.raises(UsageError) as caught:
        read(path, record())
    assert str(caught.value) == (
        f"--update {path}: no block to update: <!-- bench-summary --> or <!-- bench-tables -->"
    )


def test_a_block_without_an_end_is_refused():
    with pytest.raises(UsageError, match=r"^the block bench-summary has no end: <!-- /bench-summ"):
        updated("<!-- bench-summary -->\ntext\n", record())


def test_an_absent_document_is_refused(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        read(tmp_path / "absent.md", record())


def test_published_blocks_are_rendered_from_the_published_data():
    page = ROOT / "docs/benchmarks.md"
    assert read(page, BenchRecord.read(ROOT / "docs/benchmarks.json")) == page.read_text(), (
        "run: opacus-bpclip bench --from-json docs/benchmarks.json --update docs/benchmarks.md"
    )
