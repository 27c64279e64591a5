"""The generated blocks of documents, and that the published ones say what the data says."""

from pathlib import Path

import pytest

from opacus_bpclip.bench.documents import updated
from opacus_bpclip.bench.report import summary, tables
from opacus_bpclip.bench.results import BenchRecord
from opacus_bpclip.jobs.errors import UsageError
from tests.bench.tiny import CNN, record

ROOT = Path(__file__).parents[2]
START, END = "<!-- bench-summary -->\n", "<!-- /bench-summary -->\n"
TABLES, TABLES_END = "<!-- bench-tables -->\n", "<!-- /bench-tables -->\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "page.md"


def test_blocks_are_rewritten_and_nothing_else(path):
    path.write_text(f"before\n{START}old\n{END}between\n{TABLES}{TABLES_END}after\n")
    text = updated(path, record(CNN))
    short, long = summary(record(CNN)), tables(record(CNN))
    assert text == (
        f"before\n{START}\n{short}\n\n{END}between\n{TABLES}\n{long}\n\n{TABLES_END}after\n"
    )
    path.write_text(text)
    assert updated(path, record(CNN)) == text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("no block\n", "no block to update: <!-- bench-summary --> or <!-- bench-tables -->"),
        (f"{START}text\n", "the block bench-summary has no end: <!-- /bench-summary -->"),
        (None, "[Errno 2] No such file or directory: "),
    ],
)
def test_a_document_without_a_whole_block_is_refused(text, problem, path):
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError) as caught:
        updated(path, record())
    assert str(caught.value).startswith(f"--update {path}: {problem}")


def test_published_blocks_are_rendered_from_the_published_data():
    page = ROOT / "docs/benchmarks.md"
    assert updated(page, BenchRecord.read(ROOT / "docs/benchmarks.json")) == page.read_text(), (
        "run: opacus-bpclip bench --from-json docs/benchmarks.json --update docs/benchmarks.md"
    )
