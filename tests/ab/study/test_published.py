"""What the documentation publishes is what the lines in the repository say."""

from pathlib import Path

import pytest

from opacus_bpclip.ab.study.file import read_study
from opacus_bpclip.ab.study.report import render
from opacus_bpclip.ab.study.results import StudyRecord
from opacus_bpclip.jobs.tables import PAGE

ROOT = Path(__file__).parents[3]
LINES = sorted((ROOT / "benchmarks/studies").glob("*.jsonl"))


@pytest.fixture(params=LINES, ids=lambda path: path.stem)
def record(request, monkeypatch):
    # Where the studies' commands run.
    monkeypatch.syspath_prepend(request.param.parent)
    study = read_study(request.param.with_suffix(".toml"))
    return StudyRecord.read(request.param).model_copy(update={"settings": study})


def test_there_are_results():
    assert LINES


def test_all_runs_of_a_study_are_there(record):
    assert record.complete
    assert not [result.note for result in record.asked if result.note]


def test_the_page_has_each_table(record):
    text = (ROOT / "docs/study-results.md").read_text()
    tables = [part for part in render(record, PAGE).split("\n\n") if part.startswith("|")]
    assert len(tables) == len(record.settings.cells)
    for table in tables:
        assert table in text


def test_runs_of_a_cell_spend_what_it_allows(record):
    for result in record.asked:
        if result.settings.is_private:
            assert result.run.epsilon <= result.settings.epsilon
            assert result.run.epsilon == pytest.approx(result.plan.epsilons[-1])
