"""What is made of the costs of fine-tuning: the page's table, the curves, and the largest batch."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


report = script("fine_tuning_report")
largest_batch = script("largest_batch").largest_batch


def line(result, measured, **of):
    return json.dumps({"of": {"measured": measured, "what": "full", **of}, "result": result})


LINES = [
    line(200 * report.MIB, "peak", arm="opacus ghost", **report.SIZE),
    line(100 * report.MIB, "peak", arm="backprop joint", **report.SIZE),
    line(90 * report.MIB, "peak", arm="backprop joint", length=32, batch=8),
    line(
        {
            "non-private": [1.0, 2.0, 4.0],
            "opacus ghost": [3.0, 4.0, 12.0],
            "backprop joint": [2.0, 3.0, 4.0],
        },
        "seconds",
        arms=["non-private", "opacus ghost", "backprop joint"],
        **report.SIZE,
    ),
    line(640, "largest batch", arm="backprop joint", limit=4.0),
]


def test_the_table_has_medians_of_ratios_within_rounds():
    *_, ghost, joint = report.table(report.Costs(LINES)).splitlines()
    assert ghost == "| full | opacus ghost | 3.00 | 1.00 | 200 MiB | 1.00 | - |"
    assert joint == "| full | backprop joint | 1.50 | 0.67 | 100 MiB | 0.50 | 640 |"


def test_a_column_that_nothing_was_measured_for_is_left_out():
    header, *_ = report.table(report.Costs(LINES[:-1])).splitlines()
    assert header.endswith("| memory / ghost |")


def test_curves_are_drawn(tmp_path):
    report.draw(report.Costs(LINES), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("start", "each", "expected"),
    [(1.0, 0.005, 579), (1.5, 0.1, 23), (1.0, 2.0, 1), (4.5, 0.1, 0)],
)
def test_the_largest_batch_fills_the_limit(start, each, expected):
    measured = []

    def peak(batch):
        measured.append(batch)
        return max(1.2, start + each * batch)  # small batches hide behind what came before

    found = largest_batch(peak, 4.0)
    assert found == expected
    assert len(measured) <= 8
    assert found == 0 or peak(found) <= 4.0


def test_the_published_table_is_the_published_data():
    lines = (ROOT / "docs/fine-tuning.jsonl").read_text().splitlines()
    assert report.table(report.Costs(lines)) in (ROOT / "docs/fine-tuning.md").read_text()
